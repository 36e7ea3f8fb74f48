"""Memories that streams leave for later ones, so that they grow as old as those of texts of millions of tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM


class Carried(TrainerCallback):
    """What the last batch of each level that was to carry on has left; every process has its own in a checkpoint.

    Attributes:
        states: by level.
    """

    def __init__(self) -> None:
        self.states: dict[int, RecurrentCache] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Go on with what a checkpoint has."""
        file = _file(args, state)
        if file.exists():
            assert model is not None
            device = next(model.parameters()).device
            # a file of this very run
            self.states = torch.load(file, map_location=device, weights_only=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the states into the checkpoint that was just written."""
        if self.states:
            torch.save(self.states, _file(args, state))


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


def copies(cache: RecurrentCache, rows: int, device: torch.device) -> RecurrentCache:
    """The memory of one row, on its device, for so many."""
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.zeros(rows, dtype=torch.long, device=device))
    copied.batch_size = rows
    return copied


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    return checkpoint / f"carried-{args.process_index}.pt"
