"""What the tensors of a checkpoint look like, of every kind of base model, in every spelling."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_armt.checkpoints.looks import refuse_other_base
from vllm_armt.config import BACKBONES, Refused


def model(kind: str) -> tuple[dict[str, torch.Tensor], PretrainedConfig]:
    """The tensors of a base model of the sizes that transformers gives it, without data."""
    config = CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).state_dict(), config


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_model_is_told_from_others_by_its_layers(kind: str) -> None:
    tensors, config = model(kind)
    refuse_other_base(tensors, config, "config.json")
    layers = BACKBONES[kind].layers
    wrapped = {
        f"memory_cell.model.{name}".replace(f"{layers}.", "layers."): tensor for name, tensor in tensors.items()
    } | {"memory_cell.memory": torch.ones(2, 2), "memory_cell.layers.0.W_mq.weight": torch.ones(2, 2)}
    refuse_other_base(wrapped, config, "config.json")
    other = CONFIG_MAPPING["gpt2" if kind != "gpt2" else "llama"]()
    said = rf"look like an? .*{kind}.* of {config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary "
    with pytest.raises(Refused, match=said + rf"{config.vocab_size}, but x says a {other.model_type} of "):
        refuse_other_base(tensors, other, "x")


def test_layers_that_are_like_no_kinds_are_left_to_be_judged_one_by_one() -> None:
    tensors, config = model("llama")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    refuse_other_base(tensors, config, "config.json")
    refuse_other_base(tensors | {"model.layers.0.extra.weight": torch.ones(1)}, config, "config.json")


def test_sizes_are_told_apart() -> None:
    tensors, config = model("llama")
    del tensors["model.layers.31.mlp.up_proj.weight"]
    cut = {name: tensor for name, tensor in tensors.items() if ".31." not in name}
    with pytest.raises(
        Refused, match=re.escape("of 31 layers, width 4096, vocabulary 32000, but x says a llama of 32")
    ):
        refuse_other_base(cut, config, "x")
