"""The reference tells apart what it is there to tell apart: without a feature of a system its outputs are others."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from tests.support.random_models import CONFIGS, S, random_embeddings, random_model
from tests.support.reference import random_document
from vllm_armt.executor.naive import recompute


def difference(changed: Tensor, truth: Tensor) -> float:
    """Relative L2."""
    return float((changed - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_segment_leaves_matters(name: str):
    torch.manual_seed(0)
    model = random_model(CONFIGS[name])
    document, truth, _ = random_document(model, 4 * S, model.config.segmentation(4 * S))
    document[:S] = random_embeddings(model, S)
    outputs, _ = recompute(model, document, model.config.segmentation(4 * S))
    assert difference(outputs[S:], truth[S:]) > 0.05


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("armt v1", {"variant": "v2"}),
        ("armt without denominator", {"use_denom": True}),
        ("armt without correction", {"correction": True}),
        ("armt with memory in some layers", {"wrap_layers": None}),
        ("armt that stays open", {"generation_policy": "commit"}),
        ("armt from the right", {"segment_alignment": "left"}),
        ("armt in equal parts", {"segment_alignment": "left"}),
        ("armt with growing positions", {"learned_positions": "restart"}),
        ("armt with the keys before", {"sliding_window": False}),
        ("armt whose memory tokens see one another", {"memory_attention": "causal"}),
        ("armt_sw with growing positions", {"learned_positions": "restart"}),
        ("armt_sw by rows with a sink", {"memory_attention": "causal"}),
        ("armt_sw by rows with a sink", {"window_edge": "tokens"}),
        ("armt_sw by rows with a sink", {"window_positions": "restart"}),
        ("rmt with the keys before", {"sliding_window": False}),
        ("prmt", {"aliased": False}),
    ],
)
def test_what_is_special_of_a_system_matters(name: str, plain: dict[str, object]):
    torch.manual_seed(0)
    model = random_model(CONFIGS[name])
    without = copy.deepcopy(model.config)
    for field, value in plain.items():
        setattr(without, field, value)
    length = 3 * S + 2
    document, truth, _ = random_document(model, length, model.config.segmentation(2 * S + 1))
    outputs, _ = recompute(dataclasses.replace(model, config=without), document, without.segmentation(2 * S + 1))
    assert difference(outputs, truth) > 0.01
