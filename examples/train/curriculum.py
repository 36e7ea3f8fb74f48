"""Which level a training is at, and when the next one begins."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from examples.train.recipe import Stage

MEMORY = 0.97
"""Of a running mean, what stays of it at each step."""


class Curriculum(TrainerCallback, ExportableState):
    """Counts right answers and moves on; saved with every checkpoint.

    Attributes:
        stage: what the levels are.
        step: optimizer steps done.
        level: where the training is.
        since: steps of this level.
        accuracy: running mean at this level of what counts for moving on: answers from another segment, or from
            the same one where there is no other. None before the first.
    """

    def __init__(self, stage: Stage, step: int = 0, level: int = 0, since: int = 0, accuracy: float | None = None):
        self.stage = stage
        self.step = step
        self.level = level
        self.since = since
        self.accuracy = accuracy

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        attributes = {name: getattr(self, name) for name in ("step", "level", "since", "accuracy")}
        return {"args": {}, "attributes": attributes}

    @property
    def is_last(self) -> bool:
        """Whether there is no further level."""
        return self.level == len(self.stage.levels) - 1

    @property
    def is_due(self) -> bool:
        """Whether what was asked of this level is reached."""
        wanted = self.stage.finish if self.is_last else self.stage.advance
        reached = self.accuracy is not None and wanted is not None and self.accuracy > wanted
        return reached and self.since >= self.stage.patience

    def count(self, level: int, right: float, answers: float) -> None:
        """Take note of a batch's answers that count for moving on."""
        if level != self.level or answers == 0:
            return
        share = right / answers
        self.accuracy = share if self.accuracy is None else MEMORY * self.accuracy + (1 - MEMORY) * share
        self.since += 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where a checkpoint was; transformers itself would put another curriculum in this one's place."""
        for name, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self, name, value)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Move on, or end the stage, where it is due."""
        self.step = state.global_step
        if self.is_due:
            if self.is_last:
                control.should_training_stop = control.should_save = True
            else:
                self.level, self.since, self.accuracy = self.level + 1, 0, None
                control.should_log = True
        return control
