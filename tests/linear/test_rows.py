"""Which rows belong to which layers."""

from __future__ import annotations

import pytest
import torch

from vllm_armt.linear.rows import Rows


@pytest.mark.parametrize(
    ("counts", "uniform"), [((4,), True), ((2, 2, 2), True), ((1, 2, 2), False), ((2, 2, 1), False)]
)
def test_rows_are_uniform_if_all_layers_have_equally_many(counts: tuple[int, ...], uniform: bool):
    assert Rows(0, counts).is_uniform == uniform


def test_layers_are_the_consecutive_ones_from_the_first():
    assert Rows(3, (2, 5, 1)).layers == slice(3, 6)


def test_a_layers_rows_are_views_one_behind_another():
    x = torch.arange(6.0).view(6, 1).clone()
    parts = Rows(1, (1, 2, 3)).by_layer(x)
    assert [part.flatten().tolist() for part in parts] == [[0], [1, 2], [3, 4, 5]]
    parts[1].fill_(-1)
    assert x.flatten().tolist() == [0, -1, -1, 3, 4, 5]


def test_uniform_rows_stack_to_a_view_with_a_dimension_of_layers():
    x = torch.zeros(6, 2)
    stacked = Rows(0, (2, 2, 2)).stacked(x)
    assert stacked.shape == (3, 2, 2)
    stacked[1] = 1
    assert x[:, 0].tolist() == [0, 0, 1, 1, 0, 0]
