"""Graphs where there is no GPU: what they repeat are the same calls on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class CPUGraphs:
    """Counts what is captured and replayed.

    Args:
        restored: undoes what is written to pages meanwhile.
    """

    def __init__(self, restored: Callable[[], AbstractContextManager[None]]) -> None:
        self.restored = restored
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # as on a GPU, nothing is computed meanwhile
        with self.restored():
            output = run().fill_(torch.nan)
        self.captured += 1

        def again() -> None:
            output.copy_(run())
            self.replayed += 1

        return again, output
