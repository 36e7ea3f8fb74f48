"""The stacked memory projections: queries of rows, and what memory tokens write."""

from __future__ import annotations

import pytest
import torch

from tests.support.grouped import on_rank, process_weights
from vllm_armt.core import MemoryRule
from vllm_armt.linear.rows import Rows
from vllm_armt.recurrence.armt_projections import MemoryProjections

L, d, p = 3, 8, 4


def memory(
    dtype: torch.dtype = torch.float32, *, rule: MemoryRule | None = None, beta_size: int = 1
) -> MemoryProjections:
    with on_rank():
        return MemoryProjections(L, d, p, beta_size, rule or MemoryRule(), dtype)


@pytest.mark.parametrize("rows", [Rows(1, (5, 5)), Rows(0, (2, 5, 5)), Rows(2, (4,))], ids=str)
@pytest.mark.parametrize("rule", [MemoryRule(), MemoryRule(normalize=False), MemoryRule(heads=2)])
@pytest.mark.parametrize("gating", [False, True])
def test_queries_and_writes_are_the_projections_of_each_layer(rule: MemoryRule, gating: bool, rows: Rows):
    torch.manual_seed(0)
    beta_size = d if gating else rule.heads
    stacked = memory(rule=rule, beta_size=beta_size)
    W_mq, W_mk, W_mv, W_mb = (torch.randn(L, n, d) for n in (p, p, d, beta_size))
    b = torch.randn(L, beta_size)
    for layer in range(L):
        stacked.read_projection.weight.load("W_mq", layer, W_mq[layer])
        stacked.write_projection.weight.load("W_mk", layer, W_mk[layer])
        stacked.write_projection.weight.load("W_mv", layer, W_mv[layer])
        stacked.write_projection.weight.load("W_mb", layer, W_mb[layer])
        stacked.write_projection.weights["bias"].load("W_mb", layer, b[layer])
    process_weights(stacked)
    h = torch.randn(sum(rows.counts), d)
    q, (k, v, beta) = stacked.queries(h, rows), stacked.writes(h, rows)
    begin = 0
    for layer, count in enumerate(rows.counts, rows.first_layer):
        own = slice(begin, begin + count)
        torch.testing.assert_close(q[own], rule.phi(h[own] @ W_mq[layer].T))
        torch.testing.assert_close(k[own], rule.phi(h[own] @ W_mk[layer].T))
        torch.testing.assert_close(v[own], h[own] @ W_mv[layer].T)
        torch.testing.assert_close(beta[own], torch.sigmoid(h[own] @ W_mb[layer].T + b[layer]))
        begin += count


def test_a_layer_that_was_not_loaded_reads_and_writes_nothing():
    stacked = memory()
    process_weights(stacked)
    h, rows = torch.randn(5, d), Rows(0, (5,))
    assert not stacked.queries(h, rows).any()
    k, v, _ = stacked.writes(h, rows)
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_are_in_the_dtype_of_the_rows_and_writes_in_float32_whatever_that_of_the_projections(
    dtype: torch.dtype,
):
    for stacked in (memory(torch.bfloat16), memory(torch.float32)):
        process_weights(stacked)
        h, rows = torch.randn(5, d).to(dtype), Rows(0, (5,))
        assert stacked.queries(h, rows).dtype == dtype
        assert {t.dtype for t in stacked.writes(h, rows)} == {torch.float32}
