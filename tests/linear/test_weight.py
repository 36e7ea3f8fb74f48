"""Stacked weights: where a layer's part of a checkpoint goes, on one rank and on several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.grouped import on_rank
from vllm_armt.linear.onednn import PackedWeight
from vllm_armt.linear.weight import Part, StackedWeight

L, IN = 3, 8
KINDS = [StackedWeight, pytest.param(PackedWeight, id="PackedWeight, not packed yet")]


def on_ranks(
    kind: type[StackedWeight], world_size: int, parts: dict[str, Part], *in_features: int, in_shards: int = 1
) -> list[StackedWeight]:
    """The weight as each rank holds it, zeros; a vector without input features."""
    shape = (L, sum(part.local_size for part in parts.values()), *(n // in_shards for n in in_features))
    weights = []
    for rank in range(world_size):
        with on_rank(rank, world_size):
            weights.append(kind(torch.zeros(shape), parts, in_shards))
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_parts_lie_below_one_another_and_the_rest_stays(kind: type[StackedWeight]):
    (weight,) = on_ranks(kind, 1, {"a": Part(6), "b": Part(1), "c": Part(3)}, IN)
    a, c = torch.randn(6, IN), torch.randn(3, IN)
    weight.load("c", 1, c)
    weight.load("a", 1, a)
    assert torch.equal(weight[1], torch.cat([a, torch.zeros(1, IN), c]))
    assert not weight[[0, 2]].any()
    assert not weight.requires_grad


def test_a_vector_has_the_same_parts():
    first, second = on_ranks(StackedWeight, 2, {"a": Part(4, 2), "b": Part(3)})
    a, b = torch.randn(4), torch.randn(3)
    for weight in (first, second):
        weight.load("a", 2, a)
        weight.load("b", 2, b)
    assert torch.equal(first[2], torch.cat([a[:2], b]))
    assert torch.equal(second[2], torch.cat([a[2:], b]))


def test_the_shape_asked_of_a_checkpoint_is_that_before_sharding():
    parts = {"a": Part(6, 2), "b": Part(4, 2)}
    for weight in on_ranks(PackedWeight, 2, parts, IN):
        for _ in range(2):
            assert weight.shape_of("a") == (6, IN)
            assert weight.shape_of("b") == (4, IN)
            weight.pack()
    for weight in on_ranks(StackedWeight, 2, {"a": Part(6)}, IN, in_shards=2):
        assert weight.shape == (L, 6, IN // 2)
        assert weight.shape_of("a") == (6, IN)
    assert on_ranks(StackedWeight, 2, parts)[0].shape_of("b") == (4,)


def test_ranks_beyond_the_number_of_shards_hold_copies_beside_each_other():
    """Two key heads on four ranks: ranks 0 and 1 hold the first, whose queries they also hold."""
    q, k = torch.randn(8, IN), torch.randn(4, IN)
    for rank, weight in enumerate(on_ranks(StackedWeight, 4, {"q": Part(8, 4), "k": Part(4, 2)}, IN)):
        weight.load("q", 1, q)
        weight.load("k", 1, k)
        head = rank // 2
        assert torch.equal(weight[1], torch.cat([q[2 * rank : 2 * rank + 2], k[2 * head : 2 * head + 2]]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_cut_by_input_each_rank_holds_its_columns(world_size: int):
    whole = torch.randn(5, IN)
    columns: list[Tensor] = []
    for weight in on_ranks(StackedWeight, world_size, {"o": Part(5)}, IN, in_shards=world_size):
        weight.load("o", 0, whole)
        columns.append(weight[0])
    assert torch.equal(torch.cat(columns, dim=1), whole)
