"""Attention of cells and of open segments against softmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_armt.diagonal.attention import attend_cells, attend_past, past_mask

HEADS = [pytest.param(4, 4, id="a key head each"), pytest.param(4, 2, id="shared key heads")]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`[rows, heads, head_dim]` over `[columns, kv_heads, head_dim]` under bool `[rows, columns]`."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
    scores = torch.einsum("thd,chd->htc", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("htc,chd->thd", scores.masked_fill(~mask, -math.inf).softmax(-1), v).flatten(1)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_cell_sees_itself_causally_and_no_other(heads: int, kv_heads: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 5, n, 8) for n in (heads, kv_heads, kv_heads))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = torch.stack([attend(q[i], k[i], v[i], causal) for i in range(3)])
    torch.testing.assert_close(attend_cells(q, k, v), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_open_rows_see_their_own_past_and_themselves(heads: int, kv_heads: int):
    torch.manual_seed(0)
    past, width, past_width = [4, 1], 3, 4
    q = torch.randn(2, width, heads, 8)
    k, v = (torch.randn(2, past_width + width, kv_heads, 8) for _ in range(2))
    actual = attend_past(q, k, v, past_mask(torch.tensor(past), past_width, width))
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    for i, n in enumerate(past):
        columns = [*range(n), *range(past_width, past_width + width)]
        mask = torch.cat([torch.ones(width, n, dtype=torch.bool), causal], dim=1)
        torch.testing.assert_close(actual[i], attend(q[i], k[i, columns], v[i, columns], mask))


def test_the_mask_hides_columns_beyond_a_segments_past_and_rows_to_come():
    mask = past_mask(torch.tensor([2, 1]), 2, 2)
    assert mask.int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [1, 0, 1, 1]]]
