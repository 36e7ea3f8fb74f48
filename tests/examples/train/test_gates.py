"""The table of gates: beta by layer, memory token and what was told of."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train.fresh import make_model
from examples.train.gates import betas
from examples.train.recipe import Fresh
from examples.train.streams import Streams
from tests.examples.train.conftest import FRESH
from vllm_armt.babilong import Background


@pytest.fixture
def model(start):
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()


@pytest.fixture
def streams(start, books) -> Streams:
    tokenizer = AutoTokenizer.from_pretrained(start)
    text = Background.of_directory(books / "validation", tokenizer)
    return Streams(tokenizer, text, ["Daniel", "John", "Mary", "Sandra"], "validation")


def test_every_layer_and_memory_token_has_its_own(model, streams) -> None:
    for layer, bias in zip(model._layers, (-2.0, 1.0), strict=True):
        layer.W_mb.weight.data.zero_()
        layer.W_mb.bias.data.fill_(bias)
    found = betas(model, streams, "qa1", 16)
    assert found.keys() == {None, "Daniel", "John", "Mary", "Sandra"}
    for beta in found.values():
        assert torch.allclose(beta, torch.tensor([-2.0, 1.0]).sigmoid().view(2, 1).expand(2, 3))


def test_topics_are_told_apart(model, streams) -> None:
    """A gate that sees every token: what is told of opens it differently."""
    found = betas(model, streams, "qa1", 16)
    assert len({round(beta[0, 0].item(), 5) for beta in found.values()}) == len(found)


def test_a_model_without_gates_is_refused(streams) -> None:
    with pytest.raises(ValueError, match="has no gates"):
        betas(make_model(Fresh(**FRESH, memory=False), streams.encode.tokenizer, 32, seed=1), streams, "qa1", 1)
