"""Activations are those of transformers of the same name."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_armt.models.backbones.activation import _GATED, ACTIVATIONS, GatedActivation, activation

X = torch.linspace(-6, 6, 96).view(4, 24)


def config(name: str) -> LlamaConfig:
    return LlamaConfig(hidden_act=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_name_means_what_it_means_to_transformers(name: str):
    x = X.clone()
    torch.testing.assert_close(activation(config(name), "hidden_act")(x), ACT2FN[name](X))


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "vLLM"])
@pytest.mark.parametrize("name", _GATED)
def test_a_gate_is_activated_and_multiplied(name: str, kernel: bool):
    with set_current_vllm_config(VllmConfig()):
        gated = GatedActivation(config(name), "hidden_act")
    gate, up = X.chunk(2, dim=-1)
    y = (gated.kernel if kernel else gated)(X.clone())
    torch.testing.assert_close(y, ACT2FN[name](gate) * up)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        pytest.param(activation, "'gelu', 'gelu_fast', 'gelu_new', 'gelu_pytorch_tanh', 'relu', 'silu'", id="plain"),
        pytest.param(GatedActivation, "'gelu', 'gelu_pytorch_tanh', 'silu'", id="gated"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are_known(make, known: str):
    with pytest.raises(ValueError, match=rf"`hidden_act` of the base model is 'mish'; supported: {known}\.$"):
        make(config("mish"), "hidden_act")
