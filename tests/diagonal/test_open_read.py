"""What open pieces read of memories in pages: single rows where these lie, layers side by side; longer ones a copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_armt.cache.pages import LayerPages, PageLayout
from vllm_armt.core import MemoryRule
from vllm_armt.diagonal.open_index import Reads
from vllm_armt.diagonal.open_rows import _bags, _read

RULES = [MemoryRule(), MemoryRule(normalize=False), MemoryRule(use_denom=False)]
PAGES, LAYERS = 6, 3


def layout(d_mem: int, hidden_size: int, state_dtype: torch.dtype) -> PageLayout:
    return PageLayout(5, 2, 2, 4, torch.bfloat16, 6 * d_mem, hidden_size, state_dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("d_mem", "hidden_size"), [(1, 16), (4, 20), (5, 10)])
@pytest.mark.parametrize(("state_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("ids", [[3], [5, 0, 3], [2, 2, 1, 4]])
@pytest.mark.parametrize("width", [1, 3])
def test_pieces_read_what_the_rule_says(
    width: int,
    ids: list[int],
    state_dtype: torch.dtype,
    tolerance: float,
    d_mem: int,
    hidden_size: int,
    rule: MemoryRule,
):
    torch.manual_seed(0)
    shape = layout(d_mem, hidden_size, state_dtype)
    # other layers and what follows a memory in its page are NaN
    pool = torch.full((PAGES, LAYERS, shape.page_bytes), -1, dtype=torch.int8)
    pages = LayerPages(shape, pool[:, 1])
    pages.M[ids] = torch.randn(len(ids), 6 * d_mem, hidden_size).to(state_dtype)
    pages.z[ids] = rule.phi(torch.randn(len(ids), 7, d_mem)).sum(1).to(state_dtype)
    # there are more rows than those that read, in another order
    rows = torch.randperm(width * len(ids) + 2)[: width * len(ids)].view(-1, width)
    q = rule.phi(torch.randn(width * len(ids) + 2, d_mem))
    # as block tables have them
    page_ids = torch.tensor(ids, dtype=torch.int32)
    reads = Reads(width, rows, page_ids)
    stack: Any = SimpleNamespace(pages=[pages], memory=SimpleNamespace(feature_size=6 * d_mem))
    A = _read(rule, reads, _bags(stack, reads) if width == 1 else None, pages, q)
    assert A.dtype == torch.float32
    expected = rule.read(q[rows], pages.M[page_ids].float(), pages.z[page_ids].float())
    scale = expected.abs().max() if state_dtype == torch.bfloat16 else 1.0
    torch.testing.assert_close(A / scale, expected / scale, rtol=tolerance, atol=tolerance)
