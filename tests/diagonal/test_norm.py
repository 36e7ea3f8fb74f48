"""Stacked RMS norms: vLLM's kernel and plain torch give each layer's norm of its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_armt.diagonal.norm import CPU_VECTOR, StackedRMSNorm
from vllm_armt.diagonal.rows import Rows

L, EPS = 4, 1e-3
ROWS = [
    pytest.param(Rows(2, (5,)), id="one layer"),
    pytest.param(Rows(0, (3, 3, 3, 3)), id="uniform"),
    pytest.param(Rows(1, (1, 4, 4)), id="ragged"),
]
DTYPES = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.bfloat16, 2e-2, id="bfloat16")]
PATHS = [
    pytest.param(2 * CPU_VECTOR, True, id="kernel"),
    pytest.param(2 * CPU_VECTOR, False, id="torch"),
    pytest.param(CPU_VECTOR + 2, False, id="a width that the kernel refuses"),
]
"""Width, and whether the kernel may be used."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def norm(size: int, dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> StackedRMSNorm:
    """A norm with random weights that takes the path asked for."""
    made = StackedRMSNorm(L, size, EPS, dtype)
    made.weight.data.normal_()
    if made._has_kernel(torch.empty(1, size)) != kernel:
        assert not kernel
        monkeypatch.setattr(made, "_has_kernel", lambda x: False)
    return made


def expected(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """The formula in float64, row by row."""
    layer_of = [layer for layer, count in enumerate(rows.counts, rows.first_layer) for _ in range(count)]
    x = x.double()
    rms = [(sum(float(a) ** 2 for a in row) / len(row) + EPS) ** 0.5 for row in x]
    return torch.stack([x[i] / rms[i] * weight[layer].double() for i, layer in enumerate(layer_of)])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "kernel"), PATHS)
def test_rows_are_divided_by_their_rms_and_scaled_by_their_layers_weight(
    size: int, kernel: bool, rows: Rows, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    layer_norm = norm(size, dtype, kernel, monkeypatch)
    x = torch.randn(sum(rows.counts), size, dtype=dtype)
    before = x.clone()
    y = layer_norm(x, rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(x, layer_norm.weight, rows), rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "kernel"), PATHS)
def test_add_leaves_the_sum_in_the_residual_and_returns_its_norm(
    size: int, kernel: bool, rows: Rows, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    layer_norm = norm(size, dtype, kernel, monkeypatch)
    x, residual = torch.randn(2, sum(rows.counts), size, dtype=dtype)
    total = x + residual
    y = layer_norm.add(x, residual, rows)
    torch.testing.assert_close(residual, total)
    assert y.data_ptr() != residual.data_ptr()
    torch.testing.assert_close(y.double(), expected(total, layer_norm.weight, rows), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "kernel"), PATHS)
def test_rows_may_be_parts_of_wider_ones(size: int, kernel: bool, rows: Rows, monkeypatch: pytest.MonkeyPatch):
    """As the queries or keys of one head are of a projection to queries, keys and values."""
    layer_norm = norm(size, torch.float32, kernel, monkeypatch)
    x = torch.randn(sum(rows.counts), 3 * size)[:, size : 2 * size]
    before = x.clone()
    y = layer_norm(x, rows)
    torch.testing.assert_close(y.double(), expected(x, layer_norm.weight, rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_and_torch_agree(rows: Rows, monkeypatch: pytest.MonkeyPatch):
    size = 2 * CPU_VECTOR
    by_kernel, by_torch = (norm(size, torch.float32, kernel, monkeypatch) for kernel in (True, False))
    by_torch.weight.data.copy_(by_kernel.weight)
    x, residual = torch.randn(2, sum(rows.counts), size)
    torch.testing.assert_close(by_kernel(x, rows), by_torch(x, rows))
    pairs = [(x.clone(), residual.clone()) for _ in range(2)]
    added = [layer_norm.add(*pair, rows) for layer_norm, pair in zip((by_kernel, by_torch), pairs, strict=True)]
    torch.testing.assert_close(added[0], added[1])
    torch.testing.assert_close(pairs[0][1], pairs[1][1])
