"""The bytes of a page, and that views of it write through to the pool."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vllm_armt.cache.pages import ALIGNMENT, COLUMN_ALIGNMENT, LayerPages, PageLayout

LAYOUT = PageLayout(
    segment_size=8,
    num_mem_tokens=3,
    kv_heads=2,
    head_dim=4,
    kv_dtype=torch.bfloat16,
    feature_size=30,
    hidden_size=10,
    state_dtype=torch.float32,
)


def pool(layout: PageLayout, pages: int = 5, layers: int = 3) -> torch.Tensor:
    """A pool with the layers of a block side by side, as vLLM may lay it out: `[pages, layers, bytes]`."""
    return torch.zeros(pages, layers, layout.page_bytes, dtype=torch.int8)


def test_a_page_holds_the_larger_of_keys_and_values_and_memory():
    assert LAYOUT.kv_bytes == 2 * 32 * 2 * 4 * 2
    assert LAYOUT.memory_bytes == (30 * 10 + 30) * 4
    # a whole number of rows of M, 40 bytes each
    assert LAYOUT.page_bytes == 2560 >= LAYOUT.memory_bytes > LAYOUT.kv_bytes
    longer = dataclasses.replace(LAYOUT, segment_size=100)
    assert longer.page_bytes == 5120 >= longer.kv_bytes > longer.memory_bytes


@pytest.mark.parametrize(("S", "m", "columns"), [(8, 3, 32), (29, 3, 32), (30, 3, 64), (64, 0, 64), (512, 16, 544)])
def test_columns_hold_the_segment_and_its_memory_tokens_rounded_up(S: int, m: int, columns: int):
    layout = dataclasses.replace(LAYOUT, segment_size=S, num_mem_tokens=m)
    assert layout.columns == columns
    assert columns % COLUMN_ALIGNMENT == 0


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [10, 64])
@pytest.mark.parametrize("segment_size", [1, 7, 64])
def test_pages_are_aligned_and_waste_less_than_what_they_are_a_multiple_of(
    segment_size: int, hidden_size: int, state_dtype: torch.dtype
):
    layout = dataclasses.replace(LAYOUT, segment_size=segment_size, hidden_size=hidden_size, state_dtype=state_dtype)
    used = max(layout.kv_bytes, layout.memory_bytes)
    row = hidden_size * state_dtype.itemsize
    assert layout.page_bytes % ALIGNMENT == 0
    assert layout.page_bytes % row == 0
    assert used <= layout.page_bytes < used + math.lcm(ALIGNMENT, row)


def test_views_have_the_shapes_and_dtypes_of_what_they_hold():
    views = LayerPages(LAYOUT, pool(LAYOUT)[:, 1])
    assert (views.M.shape, views.M.dtype) == ((5, 30, 10), torch.float32)
    assert (views.z.shape, views.z.dtype) == ((5, 30), torch.float32)
    assert (views.k.shape, views.k.dtype) == ((5, 2, 32, 4), torch.bfloat16)
    assert (views.v.shape, views.v.dtype) == ((5, 2, 32, 4), torch.bfloat16)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_pool_as_rows_has_every_row_of_every_memory_of_the_layer_at_its_place(layer: int, state_dtype: torch.dtype):
    layout = dataclasses.replace(LAYOUT, state_dtype=state_dtype)
    views = LayerPages(layout, pool(layout)[:, layer])
    views.M.copy_(torch.randn(5, 30, 10))
    assert views.rows.shape == (4 * views.page_rows + 30, 10)
    assert views.rows.data_ptr() == views.M.data_ptr()
    for page in range(5):
        begin = page * views.page_rows
        assert torch.equal(views.rows[begin : begin + 30], views.M[page])


def test_writes_go_to_their_page_and_layer_of_the_pool_alone():
    memory = pool(LAYOUT)
    views = LayerPages(LAYOUT, memory[:, 1])
    M, z = torch.randn(2, 30, 10), torch.randn(2, 30)
    views.M[torch.tensor([3, 1])] = M
    views.z[torch.tensor([3, 1])] = z
    for page, i in ((3, 0), (1, 1)):
        written = memory[page, 1, : LAYOUT.memory_bytes].view(torch.float32)
        assert torch.equal(written, torch.cat([M[i].flatten(), z[i]]))
    untouched = memory.clone()
    untouched[[1, 3], 1, : LAYOUT.memory_bytes] = 0
    assert not untouched.any()


def test_keys_and_values_do_not_overlap():
    memory = pool(LAYOUT)
    views = LayerPages(LAYOUT, memory[:, 2])
    views.k[4], views.v[4] = 1.0, 2.0
    assert (views.k[4] == 1).all()
    assert (views.v[4] == 2).all()
    assert memory[4, 2, : LAYOUT.kv_bytes].view(torch.bfloat16).unique().tolist() == [1, 2]
    assert not memory[4, 2, LAYOUT.kv_bytes :].any()


def test_the_memory_takes_the_place_of_keys_and_values():
    views = LayerPages(LAYOUT, pool(LAYOUT)[:, 0])
    views.k[2], views.v[2] = 1.0, 1.0
    views.M[2], views.z[2] = 0.0, 0.0
    assert not views.k[2].any()
    assert not views.v[2].any()


def test_a_pool_of_another_page_size_is_refused():
    with pytest.raises(ValueError, match=r"pages have 512 bytes; the layout needs 2560"):
        LayerPages(LAYOUT, torch.zeros(5, 512, dtype=torch.int8))
