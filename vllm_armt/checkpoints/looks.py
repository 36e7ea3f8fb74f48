"""What the tensors of a checkpoint look like: the base model that they were made with, told by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_armt.checkpoints.names import is_old_buffer
from vllm_armt.config import BACKBONES, Refused

_OF_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?:layer\.)?(?P<part>.+)$")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a base model, as tensors show them or its configuration says them; None where no tensor shows one."""

    layers: int
    width: int | None
    vocabulary: int | None

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Sizes:
        return cls(config.num_hidden_layers, config.hidden_size, config.vocab_size)

    def agree(self, other: Sizes) -> bool:
        """Whether none that both have differs."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(a == b or None in (a, b) for a, b in pairs)

    def __str__(self) -> str:
        named = {"width": self.width, "vocabulary": self.vocabulary}
        return f"{self.layers} layers" + "".join(f", {name} {size}" for name, size in named.items() if size is not None)


def refuse_other_base(tensors: Mapping[str, Tensor], config: PretrainedConfig, where: str) -> None:
    """Refuse a configuration of another base model than the tensors are of, before anything is made of its sizes.

    Args:
        tensors: of the base model, or of a model around one, in any spelling; only their shapes matter.
        config: what the base model is said to be.
        where: says so.

    Raises:
        Refused: it is another kind, or of other sizes.
    """
    sizes, said, parts = _sizes(tensors), Sizes.of_config(config), _parts(tensors)
    if sizes.agree(said) and parts == _parts_of(config.model_type):
        return
    kinds = [kind for kind in sorted(BACKBONES) if _parts_of(kind) == parts]
    # layers that are like no kind's (a bias more, a tensor missing) are judged tensor by tensor
    if sizes.agree(said) and (not kinds or config.model_type in kinds):
        return
    *others, last = kinds or ["model that is not supported"]
    named = f"{', '.join(others)} or {last}" if others else last
    raise Refused(
        f"These tensors look like a {named} of {sizes}, but {where} says a {config.model_type} of {said}. Give the "
        "config.json of the model that they are of."
    )


def _sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    layers = [int(match["layer"]) for name in tensors if (match := _OF_LAYER.search(name))]
    ends = {where.rpartition(".")[2] for b in BACKBONES.values() for where in (b.embeddings, b.head)}
    shapes = [tensor.shape for name, tensor in tensors.items() if name.removesuffix(".weight").split(".")[-1] in ends]
    vocabulary, width = next((shape for shape in shapes if len(shape) == 2), (None, None))
    return Sizes(max(layers, default=-1) + 1, width, vocabulary)


def _parts(tensors: Mapping[str, Tensor]) -> set[str]:
    """The base model's names of what its decoder layers consist of."""
    found = [match["part"] for name in tensors if not is_old_buffer(name) and (match := _OF_LAYER.search(name))]
    return {_base_part(part) for part in found if not _is_ours(part)}


def _is_ours(part: str) -> bool:
    """Whether a tensor in a decoder layer's wrapper is the memory's own."""
    return part == "memory" or part.startswith("W_m")


def _base_part(part: str) -> str:
    """The base model's name of a layer's part, of which PEFT may have made others."""
    return re.sub(r"\.(base_layer|lora_[AB]\.\w+)\.", ".", part)


@cache
def _parts_of(kind: str) -> frozenset[str]:
    """Names of the tensors of a decoder layer, by transformers' defaults."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    names: Iterable[str] = model.get_submodule(BACKBONES[kind].layers)[0].state_dict()
    return frozenset(name for name in names if not is_old_buffer(name))
