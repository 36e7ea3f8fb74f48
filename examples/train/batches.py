"""Batches of streams, which a stage trains on, and what every token of them is to predict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from examples.train.recipe import Stage
from examples.train.streams import NONE, Streams

HOLD_FROM = 4
"""Segments from which on a stream can hold: facts in its first quarter only, then text."""


class Progress(Protocol):
    """How far a training has come."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def level(self) -> int:
        """Level of the curriculum, from 0."""


class Batches(IterableDataset):
    """Batches without end. Each depends on the seed, the step and the level alone, so a run can go on anywhere.

    Args:
        streams: where rows come from.
        stage: what batches are like.
        progress: of the training, asked before each batch.
        seed: of the run and the stage.
        device, devices: which one's share of the rows, of how many.
    """

    def __init__(
        self, streams: Streams, stage: Stage, progress: Progress, seed: str, device: int = 0, devices: int = 1
    ) -> None:
        self.streams = streams
        self.stage = stage
        self.progress = progress
        self.seed = seed
        self.device = device
        self.devices = devices

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            step = self.progress.step
            for i in count():
                if self.progress.step != step:
                    break
                # a step has several batches where gradients are accumulated
                yield self.batch(f"{self.seed}/{step}/{i}", self.progress.level)

    def batch(self, seed: str, level: int) -> dict[str, Tensor]:
        """A batch `[B, T]` of a level or, at the stage's rate, of one before.

        `level` in it says which, and `carries` whether it goes on from the memories that one before has left.
        """
        stage, random = self.stage, Random(seed)
        # drawn before what is each device's own: their streams are of one kind
        if level and random.random() < stage.shorter:
            level = random.randrange(level)
        shape = stage.levels[level]
        hold = shape.segments >= HOLD_FROM and random.random() < stage.hold
        carries = stage.carry > 0 and random.random() < stage.carry
        if carries:
            # an old memory may well know of whom this stream tells nothing
            stage = stage.model_copy(update={"unknown": 0.0, "empty": 0.0})
        rows = max(stage.min_rows, stage.tokens_per_step // (shape.segments * stage.segment_size))
        random = Random(f"{seed}/{self.device}")
        drawn = [self.streams.draw(random, stage, shape, hold) for _ in range(math.ceil(rows / self.devices))]
        batch = {
            name: torch.from_numpy(np.stack([getattr(row, name) for row in drawn]).astype(np.int64))
            for name in ("ids", "answers", "topics", "inferences", "begun", "distances", "cuts")
        }
        kind = {"level": torch.tensor(level), "carries": torch.tensor(carries)}
        return batch | targets(batch, stage, random) | kind


def targets(batch: dict[str, Tensor], stage: Stage, random: Random) -> dict[str, Tensor]:
    """What every token is to predict, `[B, T]`, and how much each counts: answers, and a share of the text."""
    ids, answers = batch["ids"], batch["answers"]
    generator = torch.Generator().manual_seed(random.getrandbits(63))
    is_answer = answers != NONE
    is_text = (torch.rand(ids.shape, generator=generator) < stage.language_share) & ~is_answer
    is_text[:, -1] = False
    wanted = torch.where(is_text, ids.roll(-1, dims=1), answers)
    weights = is_answer / is_answer.sum() + is_text * (stage.language_weight / is_text.sum().clamp(min=1))
    return {"targets": wanted, "weights": weights}
