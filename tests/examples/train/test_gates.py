"""The table of gates: beta by layer, memory token and what was told of."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.train.fresh import make_model
from examples.train.gates import betas, gates_of
from examples.train.recipe import Fresh
from examples.train.streams import Streams
from tests.support.texts import sentences
from tests.support.tiny_recipe import FRESH
from vllm_armt.babilong import Background
from vllm_armt.config import ARMTConfig


@pytest.fixture
def model(start):
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()


@pytest.fixture
def streams(start, books) -> Streams:
    tokenizer = AutoTokenizer.from_pretrained(start)
    text = Background.of_directory(books / "validation", tokenizer)
    return Streams(tokenizer, text, ["qa1"], "validation")


def test_every_layer_and_memory_token_has_its_own(model, streams) -> None:
    for layer, bias in zip(model._layers, (-2.0, 1.0), strict=True):
        layer.W_mb.weight.data.zero_()
        layer.W_mb.bias.data.fill_(bias)
    found = betas(model, streams, "qa1", 16)
    assert found.keys() == {None, "Daniel", "John", "Mary", "Sandra"}
    for beta in found.values():
        assert torch.allclose(beta, torch.tensor([-2.0, 1.0]).sigmoid().view(2, 1).expand(2, 3))


class OpensForMary(nn.Module):
    """Two layers of three memory tokens; in the second one, token 1 writes segments with her name in them."""

    def __init__(self, config: ARMTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.layers = nn.ModuleList(nn.ModuleDict({"W_mb": nn.Identity()}) for _ in range(2))

    def forward(self, ids: torch.Tensor, logits_to_keep: int) -> None:
        for segment in ids.split(self.config.segment_size, dim=1)[:-1]:
            names = torch.tensor(["Mary" in text for text in self.tokenizer.batch_decode(segment)])
            for i, gate in enumerate(gates_of(self)):
                logits = torch.full((len(ids), 3, 1), -20.0)
                logits[names, 1] = 20.0 if i == 1 else -20.0
                gate(logits)


def test_a_gate_is_open_for_whom_it_opens(model, streams) -> None:
    tokenizer = streams.encode.tokenizer
    streams.background = Background.of_texts([sentences(Random(0), 400).replace("Mary", "Moses")], tokenizer)
    stub: Any = OpensForMary(model.config, tokenizer)
    found = betas(stub, streams, "qa1", 64)
    assert found.keys() == {None, "Daniel", "John", "Mary", "Sandra"}
    for name, beta in found.items():
        expected = torch.zeros(2, 3)
        expected[1, 1] = name == "Mary"
        assert torch.allclose(beta, expected, atol=1e-6), name


def test_a_model_without_gates_is_refused(streams) -> None:
    with pytest.raises(ValueError, match="has no gates"):
        betas(make_model(Fresh(**FRESH, memory=False), streams.encode.tokenizer, 32, seed=1), streams, "qa1", 1)
