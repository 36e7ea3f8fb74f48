"""Stacked linear layers against one `F.linear` a layer: by every GEMM backend, on one rank and cut over several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import vllm._custom_ops as ops
from torch import Tensor

from tests.support.grouped import multiplied_by, on_rank, process_weights
from vllm_armt.linear import onednn
from vllm_armt.linear.base import Gemm
from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.grouped import GroupedGemm
from vllm_armt.linear.onednn import OneDNNGemm
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.linear.weight import Part

L, IN = 4, 32
Weights = dict[str, list[tuple[Tensor, Tensor]]]
"""By part, the weight and bias of each layer as a checkpoint has them."""


def rows_of(first_layer: int, *counts: int) -> Rows:
    return Rows(first_layer, counts, torch.tensor(counts).cumsum(0).int())


ROWS = [
    pytest.param(rows_of(2, 5), id="one layer"),
    pytest.param(rows_of(0, 3, 3, 3, 3), id="all layers"),
    pytest.param(rows_of(1, 2, 2), id="some layers"),
    pytest.param(rows_of(1, 1, 2, 2), id="ragged"),
    pytest.param(rows_of(0, 2, 1, 1, 3), id="ragged in three runs"),
]
GEMMS = [
    pytest.param(
        OneDNNGemm,
        id="onednn",
        marks=pytest.mark.skipif(not ops._supports_onednn, reason="this vLLM was built without oneDNN"),
    ),
    pytest.param(BatchedGemm, id="batched"),
    pytest.param(GroupedGemm, id="grouped"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=GEMMS)
def gemm(request: pytest.FixtureRequest) -> type[Gemm]:
    return request.param


def weights(sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> Weights:
    def layer(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, IN, dtype=dtype), torch.randn(n, dtype=dtype)

    return {part: [layer(n) for _ in range(L)] for part, n in sizes.items()}


def fill(linear: StackedLinear, given: Weights) -> None:
    for part, layers in given.items():
        for layer, (weight, b) in enumerate(layers):
            linear.weight.load(part, layer, weight)
            if linear.bias is not None:
                linear.bias.load(part, layer, b)
    process_weights(linear)


def load(
    gemm: type[Gemm],
    given: Weights,
    shards: dict[str, int] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    bias: bool = True,
    shard="output",
) -> StackedLinear:
    parts = {part: Part(len(layers[0][1]), (shards or {}).get(part, 1)) for part, layers in given.items()}
    dtype = next(iter(given.values()))[0][0].dtype
    with on_rank(rank, world_size), multiplied_by(gemm):
        linear = StackedLinear(L, IN, parts, bias, dtype, shard=shard)
    fill(linear, given)
    return linear


def every_layer(count: int) -> Rows:
    """So many rows of each layer."""
    return Rows(0, (count,) * L)


def expected(given: Weights, x: Tensor, rows: Rows, bias: bool = True) -> Tensor:
    """Each layer's linear layers of its rows, the parts side by side."""
    outputs = []
    for layer, x_l in zip(range(L)[rows.layers], x.split(rows.counts), strict=True):
        parts = [layers[layer] for layers in given.values()]
        outputs.append(torch.cat([F.linear(x_l, weight, b if bias else None) for weight, b in parts], dim=-1))
    return torch.cat(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_layers_are_each_layers_linear_with_its_parts_side_by_side(
    rows: Rows, dtype: torch.dtype, tolerance: float, bias: bool, gemm: type[Gemm]
):
    given = weights({"a": 6, "b": 1, "c": 3}, dtype)
    linear = load(gemm, given, bias=bias)
    x = torch.randn(sum(rows.counts), IN, dtype=dtype)
    before = x.clone()
    y = linear(x, rows)
    assert linear.local_sizes == [6, 1, 3]
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(given, x, rows, bias), rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_loaded_again_take_effect(bias: bool, gemm: type[Gemm]):
    old, new = weights({"a": 6, "b": 2}), weights({"a": 6, "b": 2})
    linear = load(gemm, old, bias=bias)
    x, rows = torch.randn(L * 3, IN), every_layer(3)
    torch.testing.assert_close(linear(x, rows), expected(old, x, rows, bias))
    for given in (new, old):
        fill(linear, given)
        torch.testing.assert_close(linear(x, rows), expected(given, x, rows, bias))


def test_what_is_loaded_again_in_part_leaves_the_rest(gemm: type[Gemm]):
    given = weights({"a": 6, "b": 2})
    linear = load(gemm, given)
    x, rows = torch.randn(L * 3, IN), every_layer(3)
    weight, b = torch.randn(2, IN), torch.randn(2)
    linear.weight.load("b", 1, weight)
    process_weights(linear)
    given["b"][1] = (weight, given["b"][1][1])
    torch.testing.assert_close(linear(x, rows), expected(given, x, rows))
    linear.weights["bias"].load("b", 1, b)
    process_weights(linear)
    given["b"][1] = (weight, b)
    torch.testing.assert_close(linear(x, rows), expected(given, x, rows))


@pytest.mark.skipif(not ops._supports_onednn, reason="this vLLM was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_where_a_cpu_has_no_products_of_a_dtype_they_are_those_of_float32(
    rows: Rows, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onednn, "onednn_dtype", lambda dtype: torch.float32)
    given = weights({"a": 6, "b": 2}, torch.bfloat16)
    linear = load(OneDNNGemm, given, bias=bias)
    x = torch.randn(sum(rows.counts), IN).bfloat16()
    exact = {part: [(weight.float(), b.float()) for weight, b in layers] for part, layers in given.items()}
    y = linear(x, rows)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected(exact, x.float(), rows, bias).bfloat16(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_shards_of_a_part_make_up_its_full_result(world_size: int, gemm: type[Gemm]):
    given = weights({"a": 8, "b": 12})
    shards = dict.fromkeys(given, world_size)
    x, rows = torch.randn(L * 5, IN), every_layer(5)
    ranks = [load(gemm, given, shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    pieces = [linear(x, rows).split(linear.local_sizes, dim=-1) for linear in ranks]
    whole = [torch.cat(shards_of_part, dim=-1) for shards_of_part in zip(*pieces, strict=True)]
    torch.testing.assert_close(torch.cat(whole, dim=-1), expected(given, x, rows))


@pytest.mark.parametrize("rows", [every_layer(5), rows_of(1, 5, 10, 10)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layers_cut_by_input_sum_to_the_full_result_with_the_bias_once(
    world_size: int, rows: Rows, gemm: type[Gemm], monkeypatch: pytest.MonkeyPatch
):
    given = weights({"o": 6})
    ranks = [load(gemm, given, rank=r, world_size=world_size, shard="input") for r in range(world_size)]
    x = torch.randn(sum(rows.counts), IN)
    xs = [piece.contiguous() for piece in x.chunk(world_size, dim=-1)]
    partial: list[Tensor] = []

    def all_reduce(y: Tensor) -> Tensor:
        partial.append(y)
        return torch.stack(partial).sum(0)

    monkeypatch.setattr("vllm_armt.linear.stacked.tensor_model_parallel_all_reduce", all_reduce)
    y = [linear(piece, rows) for linear, piece in zip(ranks, xs, strict=True)][-1]
    assert len(partial) == (world_size if world_size > 1 else 0)
    torch.testing.assert_close(y, expected(given, x, rows))


def test_vllm_finds_the_backend_where_it_looks_for_linear_methods(gemm: type[Gemm]):
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    assert isinstance(load(gemm, weights({"a": 6})).quant_method, QuantizeMethodBase)
