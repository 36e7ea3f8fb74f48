"""One forward pass of a batch: what it costs, and how much of it was right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from examples.train.streams import NONE
from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM

HEADS = "auxiliary_heads"
"""Of a model in training: linear maps by what they must say, as `Stream` names it."""


@dataclass
class Told(CausalLMOutputWithPast):
    """A model's output, with what its auxiliary heads say where they must say something."""

    auxiliary_logits: dict[str, Tensor] | None = None


class Counts(NamedTuple):
    """Answers by where the first fact that they need began: in their own segment, or in one before.

    Those that need a fact which a segment boundary runs through are counted once more.
    """

    same_right: int
    same: int
    cross_right: int
    cross: int
    cut_right: int
    cut: int


class Outcome(NamedTuple):
    """What a forward pass gave.

    Attributes:
        loss: of answers and text, each target as its weight says.
        auxiliary: losses of the auxiliary heads, each a sum over its targets.
        size: of the associative memories that were left, mean log(1 + |M|^2) of layers and rows; 0 if there are none.
        counts: `[6]`, as in `Counts`; an answer counts as right by its first token.
        cache: the state to go on from, where it was asked for.
    """

    loss: Tensor
    auxiliary: dict[str, Tensor]
    size: Tensor
    counts: Tensor
    cache: RecurrentCache | None


def forward(
    model: nn.Module,
    inner: RecurrentForCausalLM,
    batch: dict[str, Tensor],
    layers: Mapping[str, int] = MappingProxyType({}),
    **kwargs: Any,
) -> Outcome:
    """Run a model on a batch of `examples.train.streams`, or on a stretch of one.

    Args:
        model: what is called, as accelerate has wrapped it.
        inner: the model itself.
        batch: `[B, T]` each.
        layers: whose output each auxiliary head of the model reads.
        kwargs: further arguments of the model.
    """
    wanted = batch["targets"] != NONE
    with (
        _only(inner.get_output_embeddings(), wanted),
        _auxiliary(inner, {name: (layer, batch[name]) for name, layer in layers.items()}),
    ):
        output = model(input_ids=batch["ids"], **kwargs)
    targets = batch["targets"][wanted]
    logits = output.logits.float()
    loss = F.cross_entropy(logits, targets, reduction="none") @ batch["weights"][wanted]
    auxiliary = {}
    if isinstance(output, Told) and output.auxiliary_logits is not None:
        for name, said in output.auxiliary_logits.items():
            # segment by segment, as the head was asked
            parts = batch[name].split(inner.config.segment_size, dim=1)
            auxiliary[name] = F.cross_entropy(
                said.float(), torch.cat([part[part != NONE] for part in parts]), reduction="sum"
            )
    distances = batch["distances"][wanted]
    right = logits.argmax(-1) == targets
    kinds = (distances == 0, distances > 0, batch["cuts"][wanted] == 1)
    counts = torch.stack([count.sum() for kind in kinds for count in (right & kind, kind)])
    cache = output.past_key_values
    return Outcome(loss, auxiliary, _size_of(cache, loss), counts, cache)


def _size_of(cache: RecurrentCache | None, loss: Tensor) -> Tensor:
    if cache is None or not cache.M:
        return loss.new_zeros(())
    return torch.stack([M.square().sum((1, 2, 3)).log1p().mean() for M in cache.M.values()]).mean()


@contextmanager
def _only(head: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Let the language-model head see the tokens only of which something is wanted: logits are `[tokens, V]`."""
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][wanted], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _auxiliary(inner: RecurrentForCausalLM, asked: dict[str, tuple[int, Tensor]]) -> Iterator[None]:
    """Add to the model's output what its auxiliary heads say, by the layer that each reads and its targets `[B, T]`."""
    if not asked:
        yield
        return
    layers = inner.model.get_submodule(inner.config.backbone.layers)
    prefix = inner.config.segment_layout.prefix
    said: dict[str, list[Tensor]] = {name: [] for name in asked}

    def reader(name: str, targets: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        parts = iter(targets.split(inner.config.segment_size, dim=1))
        head = inner.get_submodule(f"{HEADS}.{name}")

        def read(module: nn.Module, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            # one segment or, in diagonal order, all of them
            for segment in rows.split(len(targets)):
                part = next(parts)
                said[name].append(head(segment[:, prefix : prefix + part.shape[1]][part != NONE]))

        return read

    def tell(module: nn.Module, args: Any, output: CausalLMOutputWithPast) -> Told:
        # in the output, or else torch takes the heads for unused when it trains on several devices
        return Told(**output, auxiliary_logits={name: torch.cat(parts) for name, parts in said.items()})

    handles = [layers[layer].register_forward_hook(reader(name, targets)) for name, (layer, targets) in asked.items()]
    handles.append(inner.register_forward_hook(tell))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
