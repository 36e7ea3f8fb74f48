"""Stacked linear layers against one `F.linear` a layer: every kind of product, on one rank and cut over several."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import vllm._custom_ops as ops
from torch import Tensor

from tests.support.grouped import on_rank
from vllm_armt.linear import onednn as products
from vllm_armt.linear import stacked
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.stacked import Part, StackedLinear, grouped_product

L, IN = 4, 8
Weights = dict[str, list[tuple[Tensor, Tensor]]]
"""By part, the weight and bias of each layer as a checkpoint has them."""
ROWS = [
    pytest.param(Rows(2, (5,)), id="one layer"),
    pytest.param(Rows(0, (3, 3, 3, 3)), id="all layers"),
    pytest.param(Rows(1, (2, 2)), id="some layers"),
    pytest.param(Rows(1, (1, 2, 2)), id="ragged"),
    pytest.param(Rows(0, (2, 1, 1, 3)), id="ragged in three runs"),
    pytest.param(Rows(1, (1, 2, 2), torch.tensor([1, 3, 5], dtype=torch.int32)), id="ragged with ends"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["packed", "not packed"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether weights are packed for oneDNN."""
    if request.param == "packed":
        if not ops._supports_onednn:
            pytest.skip("this vLLM was built without oneDNN")
    else:
        monkeypatch.setattr(stacked, "onednn_dtype", lambda dtype: None)
    return request.param == "packed"


def weights(sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> Weights:
    def layer(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, IN, dtype=dtype), torch.randn(n, dtype=dtype)

    return {part: [layer(n) for _ in range(L)] for part, n in sizes.items()}


def fill(linear: StackedLinear, given: Weights) -> None:
    for part, layers in given.items():
        for layer, (weight, b) in enumerate(layers):
            linear.load(part, "weight", layer, weight)
            if linear.bias is not None:
                linear.load(part, "bias", layer, b)


def load(
    given: Weights, shards: dict[str, int], *, rank: int = 0, world_size: int = 1, bias: bool = True, shard="output"
) -> StackedLinear:
    parts = {part: Part(len(layers[0][1]), shards[part]) for part, layers in given.items()}
    dtype = next(iter(given.values()))[0][0].dtype
    with on_rank(rank, world_size):
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
    rows: Rows, dtype: torch.dtype, tolerance: float, bias: bool, packs: bool
):
    given = weights({"a": 6, "b": 1, "c": 3}, dtype)
    linear = load(given, dict.fromkeys(given, 1), bias=bias)
    x = torch.randn(sum(rows.counts), IN, dtype=dtype)
    before = x.clone()
    y = linear(x, rows)
    assert linear.local_sizes == [6, 1, 3]
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(given, x, rows, bias), rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("rows", "batched", "grouped"),
    [
        pytest.param(Rows(0, (3, 3, 3)), 1, 0, id="uniform: one batched product"),
        pytest.param(Rows(1, (1, 2), torch.tensor([1, 3], dtype=torch.int32)), 0, 1, id="with ends: one grouped"),
        pytest.param(Rows(0, (1, 1, 2, 2)), 2, 0, id="without: a batched one for each run of equal layers"),
        pytest.param(Rows(2, (4,)), 0, 0, id="one layer: neither"),
    ],
)
def test_a_group_is_as_few_products_as_the_device_can_do(rows: Rows, batched: int, grouped: int):
    weight = torch.randn(len(rows.counts), 6, IN, dtype=torch.bfloat16)
    x = torch.randn(sum(rows.counts), IN, dtype=torch.bfloat16)
    with (
        patch.object(torch, "bmm", wraps=torch.bmm) as bmm,
        patch.object(F, "grouped_mm", wraps=F.grouped_mm) as grouped_mm,
    ):
        grouped_product(x, weight, None, rows)
    assert (bmm.call_count, grouped_mm.call_count) == (batched, grouped)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.float16, 8), (torch.bfloat16, 12)])
def test_what_a_grouped_product_would_wait_for_or_refuse_is_batched(dtype: torch.dtype, width: int):
    rows = Rows(0, (1, 2), torch.tensor([1, 3], dtype=torch.int32))
    with patch.object(F, "grouped_mm", wraps=F.grouped_mm) as grouped_mm:
        grouped_product(torch.randn(3, width, dtype=dtype), torch.randn(2, 6, width, dtype=dtype), None, rows)
    assert grouped_mm.call_count == 0


def test_packed_weights_are_not_kept_twice(packs: bool):
    given = weights({"a": 6})
    linear = load(given, {"a": 1})
    linear(torch.randn(4, IN), every_layer(1))
    assert linear.weight.numel() == (0 if packs else L * 6 * IN)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_loaded_again_take_effect(bias: bool, packs: bool):
    old, new = weights({"a": 6, "b": 2}), weights({"a": 6, "b": 2})
    linear = load(old, {"a": 1, "b": 1}, bias=bias)
    x, rows = torch.randn(L * 3, IN), every_layer(3)
    torch.testing.assert_close(linear(x, rows), expected(old, x, rows, bias))
    for given in (new, old):
        fill(linear, given)
        torch.testing.assert_close(linear(x, rows), expected(given, x, rows, bias))


def refuse(monkeypatch: pytest.MonkeyPatch, *refused: torch.dtype) -> None:
    """Make this a CPU for which oneDNN has no products of some types."""
    create = ops.create_onednn_mm

    def create_onednn_mm(weight: Tensor, primitives: int) -> ops.CPUDNNLGEMMHandler:
        if weight.dtype in refused:
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")
        return create(weight, primitives)

    monkeypatch.setattr(ops, "create_onednn_mm", create_onednn_mm)
    monkeypatch.setattr(stacked, "onednn_dtype", products.onednn_dtype.__wrapped__)


@pytest.mark.skipif(not ops._supports_onednn, reason="this vLLM was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_where_a_cpu_has_no_products_of_a_type_they_are_those_of_float32(
    rows: Rows, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    refuse(monkeypatch, torch.bfloat16)
    given = weights({"a": 6, "b": 2}, torch.bfloat16)
    linear = load(given, dict.fromkeys(given, 1), bias=bias)
    x = torch.randn(sum(rows.counts), IN).bfloat16()
    exact = {part: [(weight.float(), b.float()) for weight, b in layers] for part, layers in given.items()}
    y = linear(x, rows)
    assert y.dtype == torch.bfloat16
    assert linear.weight.numel() == 0
    torch.testing.assert_close(y, expected(exact, x.float(), rows, bias).bfloat16(), rtol=8e-3, atol=1e-6)


def test_where_a_cpu_has_no_products_at_all_they_are_torchs(monkeypatch: pytest.MonkeyPatch):
    refuse(monkeypatch, torch.bfloat16, torch.float32)
    given = weights({"a": 6}, torch.bfloat16)
    linear = load(given, {"a": 1})
    x, rows = torch.randn(L * 3, IN).bfloat16(), every_layer(3)
    torch.testing.assert_close(linear(x, rows), expected(given, x, rows), rtol=2e-2, atol=2e-2)
    assert linear.weight.numel() == L * 6 * IN


def test_the_shape_asked_of_a_checkpoint_is_that_before_sharding(packs: bool):
    linear = load(weights({"a": 6, "b": 4}), {"a": 2, "b": 2}, world_size=2)
    assert linear.weight.shape == (L, 5, IN)
    for _ in range(2):
        assert linear.shape_of("a", "weight") == (6, IN)
        assert linear.shape_of("b", "bias") == (4,)
        linear(torch.randn(L, IN), every_layer(1))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_shards_of_a_part_make_up_its_full_result(world_size: int, packs: bool):
    given = weights({"a": 8, "b": 12})
    shards = dict.fromkeys(given, world_size)
    x, rows = torch.randn(L * 5, IN), every_layer(5)
    ranks = [load(given, shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    pieces = [linear(x, rows).split(linear.local_sizes, dim=-1) for linear in ranks]
    whole = [torch.cat(shards_of_part, dim=-1) for shards_of_part in zip(*pieces, strict=True)]
    torch.testing.assert_close(torch.cat(whole, dim=-1), expected(given, x, rows))


def test_ranks_beyond_the_number_of_shards_hold_copies_beside_each_other():
    """Two key heads on four ranks: ranks 0 and 1 hold the first, whose queries they also hold."""
    given = weights({"q": 8, "k": 4})
    ranks = [load(given, {"q": 4, "k": 2}, rank=rank, world_size=4) for rank in range(4)]
    for rank, linear in enumerate(ranks):
        assert linear.local_sizes == [2, 2]
        head = rank // 2
        shard = torch.cat([given["q"][1][0][2 * rank : 2 * rank + 2], given["k"][1][0][2 * head : 2 * head + 2]])
        assert torch.equal(linear.weight[1], shard)


@pytest.mark.parametrize("rows", [every_layer(5), Rows(1, (5, 10, 10))], ids=["uniform", "ragged"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layers_cut_by_input_sum_to_the_full_result_with_the_bias_once(
    world_size: int, rows: Rows, packs: bool, monkeypatch: pytest.MonkeyPatch
):
    given = weights({"o": 6})
    ranks = [load(given, {"o": 1}, rank=r, world_size=world_size, shard="input") for r in range(world_size)]
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
