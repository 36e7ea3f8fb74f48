"""The parts of the `sdpa` backend: its mask, and attention over a past under it."""

from __future__ import annotations

import pytest
import torch

from tests.diagonal.softmax import attend, causal
from vllm_armt.diagonal.attention.sdpa import attend_past, past_mask


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_open_rows_see_their_own_past_and_themselves(heads: int, kv_heads: int):
    torch.manual_seed(0)
    past, width, past_width = [4, 1], 3, 4
    q = torch.randn(2, width, heads, 8)
    k, v = (torch.randn(2, past_width + width, kv_heads, 8) for _ in range(2))
    actual = attend_past(q, k, v, past_mask(torch.tensor(past), past_width, width))
    for i, n in enumerate(past):
        columns = [*range(n), *range(past_width, past_width + width)]
        expected = attend(q[i], k[i, columns], v[i, columns], causal(width, n))
        torch.testing.assert_close(actual[i].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_mask_hides_columns_beyond_a_segments_past_and_rows_to_come():
    mask = past_mask(torch.tensor([2, 1]), 2, 2)
    assert mask.int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [1, 0, 1, 1]]]
