"""Stacked norms: by every path each layer's norm of its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vllm_armt.linear import norm as norms
from vllm_armt.linear.norm import CPU_VECTOR, StackedLayerNorm, StackedRMSNorm
from vllm_armt.linear.rows import Rows

L, EPS = 4, 1e-3
Norm = StackedRMSNorm | StackedLayerNorm
ROWS = [
    pytest.param(Rows(2, (5,)), id="one layer"),
    pytest.param(Rows(0, (3, 3, 3, 3)), id="uniform"),
    pytest.param(Rows(1, (1, 4, 4)), id="ragged"),
]
DTYPES = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.bfloat16, 2e-2, id="bfloat16")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_norm(made: Norm) -> Norm:
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def rms(size: int, kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Norm:
    made = StackedRMSNorm(L, size, dtype, EPS)
    if kernel and not norms._kernels_round(dtype):
        pytest.skip(f"vLLM's kernels do not round to {dtype} on this CPU")
    if made._has_kernel(torch.empty(1, size, dtype=dtype), Rows(0, (1,))) != kernel:
        assert not kernel
        monkeypatch.setattr(made, "_has_kernel", lambda x, rows: False)
    return random_norm(made)


def layer(batched: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Norm:
    monkeypatch.setattr(norms, "_should_batch", lambda x: batched)
    return random_norm(StackedLayerNorm(L, CPU_VECTOR, dtype, EPS))


Make = Callable[[torch.dtype, pytest.MonkeyPatch], Norm]
PATHS = [
    pytest.param(lambda *args: rms(2 * CPU_VECTOR, True, *args), id="RMS: kernel"),
    pytest.param(lambda *args: rms(2 * CPU_VECTOR, False, *args), id="RMS: torch"),
    pytest.param(lambda *args: rms(CPU_VECTOR + 2, False, *args), id="RMS: a width that the kernel refuses"),
    pytest.param(lambda *args: layer(False, *args), id="layer norm: one layer after another"),
    pytest.param(lambda *args: layer(True, *args), id="layer norm: batched"),
]

if torch.cuda.is_available():
    PATHS.append(
        pytest.param(lambda dtype, _: random_norm(StackedRMSNorm(L, 64, dtype, EPS).cuda()), id="RMS: on a GPU")
    )


def random_input(made: Norm, rows: Rows, dtype: torch.dtype) -> Tensor:
    # a mean that is not zero tells the two norms apart
    return torch.randn(sum(rows.counts), made.weight.shape[1], dtype=dtype, device=made.weight.device) + 1


def expected(made: Norm, x: Tensor, rows: Rows) -> Tensor:
    """The formula in float64, row by row."""
    layers = [layer for layer, count in enumerate(rows.counts, rows.first_layer) for _ in range(count)]
    outputs = []
    for row, i in zip(x.double(), layers, strict=True):
        centred = row - row.mean() if isinstance(made, StackedLayerNorm) else row
        scaled = centred / (centred.square().mean() + EPS).sqrt() * made.weight[i]
        outputs.append(scaled + made.bias[i] if isinstance(made, StackedLayerNorm) else scaled)
    return torch.stack(outputs)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", PATHS)
def test_rows_have_the_norm_of_their_layer(
    make: Make, rows: Rows, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    made = make(dtype, monkeypatch)
    x = random_input(made, rows, dtype)
    before = x.clone()
    y = made(x, rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(made, x, rows), rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", PATHS)
def test_add_leaves_the_sum_in_the_residual_and_returns_its_norm(
    make: Make, rows: Rows, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    made = make(dtype, monkeypatch)
    x, residual = random_input(made, rows, dtype), random_input(made, rows, dtype)
    total = x + residual
    y = made.add(x, residual, rows)
    torch.testing.assert_close(residual, total)
    assert y.data_ptr() != residual.data_ptr()
    torch.testing.assert_close(y.double(), expected(made, total, rows), rtol=tolerance, atol=tolerance)


def test_results_in_bfloat16_are_rounded_and_not_cut_off():
    """By whichever path this CPU takes. What is cut off makes values smaller by 0.2 % on average."""
    made = random_norm(StackedRMSNorm(L, 512, torch.bfloat16, EPS))
    rows = Rows(0, (4, 4, 4, 4))
    x, residual = random_input(made, rows, torch.bfloat16), torch.zeros(16, 512, dtype=torch.bfloat16)
    exact = expected(made, x, rows)
    for y in (made(x, rows), made.add(x, residual, rows)):
        assert float((y * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", PATHS)
def test_rows_may_be_parts_of_wider_ones(make: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch):
    """As the queries or keys of one head are of a projection to queries, keys and values."""
    made = make(torch.float32, monkeypatch)
    wide = torch.cat([random_input(made, rows, torch.float32) for _ in range(3)], dim=1)
    x = wide.chunk(3, dim=1)[1]
    before = x.clone()
    y = made(x, rows)
    torch.testing.assert_close(y.double(), expected(made, x, rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", [PATHS[0], PATHS[3]])
def test_a_group_is_its_layers_one_at_a_time(make: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch):
    made = make(torch.float32, monkeypatch)
    x = random_input(made, rows, torch.float32)
    single = [made(x_l, Rows(i, (len(x_l),))) for i, x_l in enumerate(rows.by_layer(x), rows.first_layer)]
    assert torch.equal(made(x, rows), torch.cat(single))


@pytest.mark.parametrize("rows", ROWS)
def test_an_rms_norm_whose_weight_is_wider_than_its_rows_is_computed_in_the_dtype_of_the_weight(rows: Rows):
    made = random_norm(StackedRMSNorm(L, CPU_VECTOR, torch.float32, EPS))
    x = random_input(made, rows, torch.bfloat16)
    # within one rounding, not two
    torch.testing.assert_close(made(x, rows).float(), made(x.float(), rows), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("batched", "calls"), [(True, 1), (False, 4)])
def test_a_layer_norm_of_a_uniform_group_is_one_call_where_that_is_faster(
    batched: bool, calls: int, monkeypatch: pytest.MonkeyPatch
):
    made = layer(batched, torch.float32, monkeypatch)
    rows = Rows(0, (3, 3, 3, 3))
    seen: list[Tensor] = []

    def layer_norm(x: Tensor, *args, **kwargs) -> Tensor:
        seen.append(x)
        return torch.layer_norm(x, *args, **kwargs)

    monkeypatch.setattr(norms.F, "layer_norm", layer_norm)
    made(random_input(made, rows, torch.float32), rows)
    assert len(seen) == calls
