"""Stacked linear layers against one `F.linear` a layer, on one rank and cut over several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.diagonal.reference import on_rank
from vllm_armt.diagonal.stacked import Part, StackedLinear

L, IN = 4, 8
Weights = dict[str, list[tuple[Tensor, Tensor]]]
"""By part, the weight and bias of each layer as a checkpoint has them."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weights(sizes: dict[str, int]) -> Weights:
    return {part: [(torch.randn(n, IN), torch.randn(n)) for _ in range(L)] for part, n in sizes.items()}


def load(
    given: Weights, shards: dict[str, int], *, rank: int = 0, world_size: int = 1, bias: bool = True, shard="output"
) -> StackedLinear:
    parts = {part: Part(len(layers[0][1]), shards[part]) for part, layers in given.items()}
    with on_rank(rank, world_size):
        linear = StackedLinear(L, IN, parts, bias, torch.float32, shard=shard)
    for part, layers in given.items():
        for layer, (weight, b) in enumerate(layers):
            linear.load(part, "weight", layer, weight)
            if bias:
                linear.load(part, "bias", layer, b)
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [slice(0, 4), slice(1, 3), slice(2, 3)])
def test_a_slice_of_layers_is_each_layers_linear_with_its_parts_side_by_side(layers: slice, bias: bool):
    given = weights({"a": 6, "b": 1, "c": 3})
    linear = load(given, dict.fromkeys(given, 1), bias=bias)
    x = torch.randn(layers.stop - layers.start, 5, IN)
    y = linear(x, layers)
    for i, layer in enumerate(range(L)[layers]):
        for part, actual in zip(given, y[i].split(linear.local_sizes, dim=-1), strict=True):
            weight, b = given[part][layer]
            torch.testing.assert_close(actual, F.linear(x[i], weight, b if bias else None))


def test_the_shape_asked_of_a_checkpoint_is_that_before_sharding():
    linear = load(weights({"a": 6, "b": 4}), {"a": 2, "b": 2}, world_size=2)
    assert linear.weight.shape == (L, 5, IN)
    assert linear.shape_of("a", "weight") == (6, IN)
    assert linear.shape_of("b", "bias") == (4,)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_shards_of_a_part_make_up_its_full_result(world_size: int):
    given = weights({"a": 8, "b": 12})
    shards = dict.fromkeys(given, world_size)
    x = torch.randn(L, 5, IN)
    ranks = [load(given, shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    pieces = [linear(x, slice(0, L)).split(linear.local_sizes, dim=-1) for linear in ranks]
    for part, shards_of_part in zip(given, zip(*pieces, strict=True), strict=True):
        expected = torch.stack([F.linear(x[layer], *given[part][layer]) for layer in range(L)])
        torch.testing.assert_close(torch.cat(shards_of_part, dim=-1), expected)


def test_ranks_beyond_the_number_of_shards_hold_copies_beside_each_other():
    """Two key heads on four ranks: ranks 0 and 1 hold the first, whose queries they also hold."""
    given = weights({"q": 8, "k": 4})
    ranks = [load(given, {"q": 4, "k": 2}, rank=rank, world_size=4) for rank in range(4)]
    for rank, linear in enumerate(ranks):
        assert linear.local_sizes == [2, 2]
        head = rank // 2
        expected = torch.cat([given["q"][1][0][2 * rank : 2 * rank + 2], given["k"][1][0][2 * head : 2 * head + 2]])
        assert torch.equal(linear.weight[1], expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layers_cut_by_input_sum_to_the_full_result_with_the_bias_once(
    world_size: int, monkeypatch: pytest.MonkeyPatch
):
    given = weights({"o": 6})
    ranks = [load(given, {"o": 1}, rank=r, world_size=world_size, shard="input") for r in range(world_size)]
    x = torch.randn(L, 5, IN)
    xs = x.chunk(world_size, dim=-1)
    partial: list[Tensor] = []

    def all_reduce(y: Tensor) -> Tensor:
        partial.append(y)
        return torch.stack(partial).sum(0)

    monkeypatch.setattr("vllm_armt.diagonal.stacked.tensor_model_parallel_all_reduce", all_reduce)
    y = [linear(piece, slice(0, L)) for linear, piece in zip(ranks, xs, strict=True)][-1]
    assert len(partial) == (world_size if world_size > 1 else 0)
    torch.testing.assert_close(y, torch.stack([F.linear(x[layer], *given["o"][layer]) for layer in range(L)]))
