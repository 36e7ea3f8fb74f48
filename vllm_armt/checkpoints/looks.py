"""What the tensors of a checkpoint look like: the base model that they were made with, told by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_armt.checkpoints.names import is_old_buffer
from vllm_armt.config import BACKBONES, Refused

_OF_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?:layer\.)?(?P<part>.+)$")


@dataclass(frozen=True)
class Looks:
    """A base model as its tensors show it, or its configuration says it.

    Attributes:
        kinds: the `model_type`s that have such layers; none where no supported one has.
        layers: their number.
        width: d; None where no tensor shows it.
        vocabulary: tokens; None where no tensor shows it.
    """

    kinds: tuple[str, ...]
    layers: int
    width: int | None
    vocabulary: int | None

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Looks:
        """Told by tensors of a base model, or of a model around one, in any spelling."""
        found = [match for name in tensors if not is_old_buffer(name) and (match := _OF_LAYER.search(name))]
        parts = {_base_part(match["part"]) for match in found if not _is_ours(match["part"])}
        ends = {where.rpartition(".")[2] for b in BACKBONES.values() for where in (b.embeddings, b.head)}
        shapes = [
            tensor.shape for name, tensor in tensors.items() if name.split(".")[-2:-1] and name.split(".")[-2] in ends
        ]
        vocabulary, width = next((shape for shape in shapes if len(shape) == 2), (None, None))
        layers = max((int(match["layer"]) for match in found), default=-1) + 1
        kinds = tuple(kind for kind in sorted(BACKBONES) if parts and _parts_of(kind) == parts)
        return cls(kinds, layers, width, vocabulary)

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Looks:
        """Told by a configuration."""
        return cls((config.model_type,), config.num_hidden_layers, config.hidden_size, config.vocab_size)

    def __str__(self) -> str:
        *others, last = self.kinds or ("model that is not supported",)
        named = f"{', '.join(others)} or {last}" if others else last
        sizes = {"width": self.width, "vocabulary": self.vocabulary}
        known = "".join(f", {name} {size}" for name, size in sizes.items() if size is not None)
        return f"a {named} of {self.layers} layers{known}"


def refuse_other_base(tensors: Mapping[str, Tensor], config: PretrainedConfig, where: str) -> None:
    """Refuse a configuration of another base model than the tensors are of, before anything is made of its sizes.

    Args:
        tensors: of the base model, or of a model around one.
        config: what the base model is said to be.
        where: says so.

    Raises:
        Refused: it is another kind, or of other sizes.
    """
    looks, said = Looks.of_tensors(tensors), Looks.of_config(config)
    # a kind whose layers are known by no tensor (a bias more, one missing) is judged tensor by tensor
    if (not looks.kinds or config.model_type in looks.kinds) and all(
        found in (None, told)
        for found, told in (
            (looks.layers, said.layers),
            (looks.width, said.width),
            (looks.vocabulary, said.vocabulary),
        )
    ):
        return
    raise Refused(
        f"These tensors look like {looks}, but {where} says {said}. Give the config.json of the model that they are of."
    )


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
