"""The stacked memory projections: queries of rows, and what memory tokens write."""

from __future__ import annotations

import pytest
import torch

from tests.diagonal.reference import on_rank
from vllm_armt.core import MemoryRule
from vllm_armt.diagonal.memory import StackedMemory

L, d, p = 3, 8, 2


def memory(dtype: torch.dtype = torch.float32, *, rule: MemoryRule | None = None) -> StackedMemory:
    with on_rank():
        return StackedMemory(L, d, p, rule or MemoryRule(), dtype)


@pytest.mark.parametrize("rule", [MemoryRule(), MemoryRule(normalize=False)])
def test_queries_and_writes_are_the_projections_of_each_layer(rule: MemoryRule):
    torch.manual_seed(0)
    stacked = memory(rule=rule)
    W_mq, W_mk, W_mv, W_mb = (torch.randn(L, n, d) for n in (p, p, d, 1))
    b = torch.randn(L, 1)
    for layer in range(L):
        stacked.read_projection.load("W_mq", "weight", layer, W_mq[layer])
        stacked.write_projection.load("W_mk", "weight", layer, W_mk[layer])
        stacked.write_projection.load("W_mv", "weight", layer, W_mv[layer])
        stacked.write_projection.load("W_mb", "weight", layer, W_mb[layer])
        stacked.write_projection.load("W_mb", "bias", layer, b[layer])
    h = torch.randn(2, 5, d)
    q, (k, v, beta) = stacked.queries(slice(1, 3), h), stacked.writes(slice(1, 3), h)
    for i, layer in enumerate((1, 2)):
        torch.testing.assert_close(q[i], rule.phi(h[i] @ W_mq[layer].T))
        torch.testing.assert_close(k[i], rule.phi(h[i] @ W_mk[layer].T))
        torch.testing.assert_close(v[i], h[i] @ W_mv[layer].T)
        torch.testing.assert_close(beta[i], torch.sigmoid(h[i] @ W_mb[layer].T + b[layer]))


def test_a_layer_that_was_not_loaded_reads_and_writes_nothing():
    stacked = memory()
    h = torch.randn(1, 5, d)
    assert not stacked.queries(slice(0, 1), h).any()
    k, v, _ = stacked.writes(slice(0, 1), h)
    assert not k.any()
    assert not v.any()


def test_features_are_float32_whatever_the_dtype_of_the_model_and_the_projections():
    stacked = memory(torch.bfloat16)
    h = torch.randn(1, 5, d, dtype=torch.float16)
    assert {t.dtype for t in (stacked.queries(slice(0, 1), h), *stacked.writes(slice(0, 1), h))} == {torch.float32}
