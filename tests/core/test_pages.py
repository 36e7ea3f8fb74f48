"""The bytes of a page, and that views of it write through to the pool."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from vllm_armt.config import RecurrentConfig
from vllm_armt.config.armt import ARMTConfig, ARMTSWConfig
from vllm_armt.config.rmt import RMTConfig
from vllm_armt.core.pages import ALIGNMENT, COLUMN_ALIGNMENT, LayerPages, PageLayout, StateTensor


def memory(K: int = 30, d: int = 10, dtype: torch.dtype = torch.float32, heads: int = 1) -> dict[str, StateTensor]:
    """The state of an associative memory."""
    shape = (heads, K // heads, d // heads)
    return {"M": StateTensor(shape, dtype), "z": StateTensor(shape[:2], dtype)}


LAYOUT = PageLayout(
    segment_size=8,
    rows=11,
    kv_heads=2,
    head_dim=4,
    kv_dtype=torch.bfloat16,
    state=memory(),
)


def small(system: Any, **fields: Any) -> Any:
    """A configuration of S = 8 and m = 3 around a Llama of width 16."""
    base = LlamaConfig(hidden_size=16, num_attention_heads=2)
    return system(base_model_config=base, segment_size=8, num_mem_tokens=3, **fields)


def pool(layout: PageLayout, pages: int = 5, layers: int = 3) -> torch.Tensor:
    """A pool with the layers of a block side by side, as vLLM may lay it out: `[pages, layers, bytes]`."""
    return torch.zeros(pages, layers, layout.page_bytes, dtype=torch.int8)


def test_a_page_holds_the_larger_of_keys_and_values_and_memory():
    assert LAYOUT.kv_bytes == 2 * 32 * 2 * 4 * 2
    assert LAYOUT.state_bytes == (30 * 10 + 30) * 4
    # a whole number of rows of M, 40 bytes each
    assert LAYOUT.page_bytes == 2560 >= LAYOUT.state_bytes > LAYOUT.kv_bytes
    longer = dataclasses.replace(LAYOUT, rows=100)
    assert longer.page_bytes == 5120 >= longer.kv_bytes > longer.state_bytes


@pytest.mark.parametrize(("rows", "columns"), [(11, 32), (32, 32), (33, 64), (64, 64), (528, 544)])
def test_columns_hold_the_rows_of_a_segment_rounded_up(rows: int, columns: int):
    layout = dataclasses.replace(LAYOUT, rows=rows)
    assert layout.columns == columns
    assert columns % COLUMN_ALIGNMENT == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "heads"), [(10, 1), (64, 1), (64, 4)])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("keys_stay", [False, True])
def test_pages_are_aligned_and_waste_less_than_what_they_are_a_multiple_of(
    rows: int, d: int, heads: int, dtype: torch.dtype, keys_stay: bool
):
    layout = dataclasses.replace(LAYOUT, rows=rows, state=memory(48, d, dtype, heads), keys_stay=keys_stay)
    used = max(layout.kv_bytes, layout.state_offset + layout.state_bytes)
    row = d // heads * dtype.itemsize
    assert layout.page_bytes % ALIGNMENT == layout.page_bytes % row == 0
    assert used <= layout.page_bytes < used + math.lcm(ALIGNMENT, row)


@pytest.mark.parametrize(
    ("config", "state", "keys_stay"),
    [
        (small(ARMTConfig, d_mem=4), {"M": ((1, 24, 16), torch.float32), "z": ((1, 24), torch.float32)}, False),
        (
            small(ARMTConfig, d_mem=4, n_heads=2, state_dtype="bfloat16"),
            {"M": ((2, 12, 8), torch.bfloat16), "z": ((2, 12), torch.bfloat16)},
            False,
        ),
        (small(ARMTSWConfig, d_mem=4), {"M": ((1, 24, 16), torch.float32), "z": ((1, 24), torch.float32)}, True),
        (small(RMTConfig), {"memory": ((3, 16), torch.float16)}, False),
    ],
)
def test_the_layout_of_a_system_has_what_its_configuration_says(
    config: RecurrentConfig, state: dict[str, Any], keys_stay: bool
):
    layout = config.page_layout(kv_heads=1, head_dim=8, dtype=torch.float16)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in layout.state.items()} == state
    assert (layout.segment_size, layout.rows, layout.keys_stay) == (8, config.segment_layout.rows, keys_stay)


def test_keys_that_stay_lie_beside_the_state():
    layout = dataclasses.replace(LAYOUT, keys_stay=True)
    views = LayerPages(layout, pool(layout)[:, 0])
    views.k[2], views.v[2] = 1.0, 2.0
    for tensor in views.state.values():
        tensor[2] = 3.0
    assert (views.k[2] == 1).all()
    assert (views.v[2] == 2).all()


def test_views_have_the_shapes_and_dtypes_of_what_they_hold():
    views = LayerPages(LAYOUT, pool(LAYOUT)[:, 1])
    assert (views.state["M"].shape, views.state["M"].dtype) == ((5, 1, 30, 10), torch.float32)
    assert (views.state["z"].shape, views.state["z"].dtype) == ((5, 1, 30), torch.float32)
    assert (views.k.shape, views.k.dtype) == ((5, 2, 32, 4), torch.bfloat16)
    assert (views.v.shape, views.v.dtype) == ((5, 2, 32, 4), torch.bfloat16)


def test_writes_go_to_their_page_and_layer_of_the_pool_alone():
    pages = pool(LAYOUT)
    views = LayerPages(LAYOUT, pages[:, 1])
    M, z = torch.randn(2, 1, 30, 10), torch.randn(2, 1, 30)
    views.state["M"][torch.tensor([3, 1])] = M
    views.state["z"][torch.tensor([3, 1])] = z
    for page, i in ((3, 0), (1, 1)):
        written = pages[page, 1, : LAYOUT.state_bytes].view(torch.float32)
        assert torch.equal(written, torch.cat([M[i].flatten(), z[i].flatten()]))
    untouched = pages.clone()
    untouched[[1, 3], 1, : LAYOUT.state_bytes] = 0
    assert not untouched.any()


def test_keys_and_values_do_not_overlap():
    pages = pool(LAYOUT)
    views = LayerPages(LAYOUT, pages[:, 2])
    views.k[4], views.v[4] = 1.0, 2.0
    assert (views.k[4] == 1).all()
    assert (views.v[4] == 2).all()
    assert pages[4, 2, : LAYOUT.kv_bytes].view(torch.bfloat16).unique().tolist() == [1, 2]
    assert not pages[4, 2, LAYOUT.kv_bytes :].any()


def test_the_memory_takes_the_place_of_keys_and_values():
    views = LayerPages(LAYOUT, pool(LAYOUT)[:, 0])
    views.k[2], views.v[2] = 1.0, 1.0
    for tensor in views.state.values():
        tensor[2] = 0.0
    assert not views.k[2].any()
    assert not views.v[2].any()


def test_a_pool_of_another_page_size_is_refused():
    with pytest.raises(ValueError, match=r"pages have 512 bytes; the layout needs 2560"):
        LayerPages(LAYOUT, torch.zeros(5, 512, dtype=torch.int8))
