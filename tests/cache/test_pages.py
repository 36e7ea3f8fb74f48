"""The bytes of a page, and that views of it write through to the pool."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_armt.cache.pages import ALIGNMENT, LayerPages, PageLayout

LAYOUT = PageLayout(
    segment_size=8,
    kv_heads=2,
    head_dim=4,
    kv_dtype=torch.bfloat16,
    feature_size=12,
    hidden_size=10,
    state_dtype=torch.float32,
)


def pool(layout: PageLayout, pages: int = 5, layers: int = 3) -> torch.Tensor:
    """A pool with the layers of a block side by side, as vLLM may lay it out: `[pages, layers, bytes]`."""
    return torch.zeros(pages, layers, layout.page_bytes, dtype=torch.int8)


def test_a_page_holds_the_larger_of_keys_and_values_and_memory():
    assert LAYOUT.kv_bytes == 2 * 8 * 2 * 4 * 2
    assert LAYOUT.memory_bytes == (12 * 10 + 12) * 4
    assert LAYOUT.page_bytes == 768
    longer = dataclasses.replace(LAYOUT, segment_size=100)
    assert longer.page_bytes == 3328 >= longer.kv_bytes > longer.memory_bytes


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segment_size", [1, 7, 64])
def test_pages_are_aligned_and_waste_less_than_the_alignment(segment_size: int, state_dtype: torch.dtype):
    layout = dataclasses.replace(LAYOUT, segment_size=segment_size, state_dtype=state_dtype)
    used = max(layout.kv_bytes, layout.memory_bytes)
    assert layout.page_bytes % ALIGNMENT == 0
    assert used <= layout.page_bytes < used + ALIGNMENT


def test_views_have_the_shapes_and_dtypes_of_what_they_hold():
    views = LayerPages(LAYOUT, pool(LAYOUT)[:, 1])
    assert (views.M.shape, views.M.dtype) == ((5, 12, 10), torch.float32)
    assert (views.z.shape, views.z.dtype) == ((5, 12), torch.float32)
    assert (views.k.shape, views.k.dtype) == ((5, 8, 2, 4), torch.bfloat16)
    assert (views.v.shape, views.v.dtype) == ((5, 8, 2, 4), torch.bfloat16)


def test_writes_go_to_their_page_and_layer_of_the_pool_alone():
    memory = pool(LAYOUT)
    views = LayerPages(LAYOUT, memory[:, 1])
    M, z = torch.randn(2, 12, 10), torch.randn(2, 12)
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
    with pytest.raises(ValueError, match=r"pages have 512 bytes; the layout needs 768"):
        LayerPages(LAYOUT, torch.zeros(5, 512, dtype=torch.int8))
