"""Memories that streams leave for later ones, so that they grow as old as those of texts of millions of tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from examples.train.recipe import Stage
from examples.train.streams import Batches, Streams
from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM

READ_AT_ONCE = 64
"""Segments of one call of a model that reads."""


class Carried(TrainerCallback):
    """What the last batch of each level that was to carry on has left; every process has its own in a checkpoint.

    Attributes:
        batches: that are trained on.
        states: by level; before the first such batch what has read `age` tokens, if the stage says so.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.states: dict[int, RecurrentCache] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: RecurrentForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        """Go on with what a checkpoint has, or begin with old memories."""
        assert model is not None
        file = _file(args, state)
        if file.exists():
            # a file of this very run
            self.states = torch.load(file, map_location=model.device, weights_only=False)
        elif self.batches.stage.age:
            self.states = self._aged(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the states into the checkpoint that was just written."""
        if self.states:
            torch.save(self.states, _file(args, state))

    def _aged(self, model: RecurrentForCausalLM) -> dict[int, RecurrentCache]:
        stage, batches = self.batches.stage, self.batches
        readings = math.ceil(stage.age / (READ_AT_ONCE * stage.segment_size))
        seed = f"{batches.seed}/{batches.device}"
        *_, state = islice(reading(model, batches.streams, stage, stage.min_rows, seed), readings)
        return {level: copies(state, batches.rows(level)) for level in range(len(stage.levels))}


def reading(
    model: RecurrentForCausalLM, streams: Streams, stage: Stage, rows: int, seed: str
) -> Iterator[RecurrentCache]:
    """The memories of so many texts in which nothing is told, without end: after every `READ_AT_ONCE` segments more."""
    state, T = None, READ_AT_ONCE * stage.segment_size
    model.eval()
    for part in count():
        texts = [streams.text(Random(f"{seed}/{part}/{row}"), stage, T) for row in range(rows)]
        ids = torch.from_numpy(np.stack(texts)).long().to(model.device)
        with torch.no_grad():
            output = model(ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        state = cut_off(model, output.past_key_values)
        yield state


def cut_off(model: RecurrentForCausalLM, cache: RecurrentCache | None) -> RecurrentCache:
    """Close the open segment, and let no gradient flow back into what is kept of it and of those before."""
    assert cache is not None
    with torch.no_grad():
        model.close_segment(cache)
    for state in (cache.M, cache.z, cache.memory):
        state.update({layer: tensor.detach() for layer, tensor in state.items()})
    for layer in cache.window.layers if cache.window is not None else ():
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


def copies(cache: RecurrentCache, rows: int) -> RecurrentCache:
    """The memories of `rows` streams: those of a cache, in turn, as often as it takes."""
    copied = copy.deepcopy(cache)
    some = next(iter([*cache.M.values(), *cache.memory.values()]))
    copied.reorder_cache(torch.arange(rows, device=some.device) % cache.batch_size)
    copied.batch_size = rows
    return copied


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    return checkpoint / f"carried-{args.process_index}.pt"
