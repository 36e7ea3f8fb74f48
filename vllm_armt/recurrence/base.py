"""A recurrence: what stands around the tokens of a segment, and what flows from one segment to the next.

The executors run decoder layers and call their recurrence before and after each of them; which rows are added
to, replaced or remembered is the recurrence's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow, Group
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata

R = TypeVar("R")
"""What a recurrence knows of a step's tails."""


class WaveState(Protocol):
    """What flows through a wave; its groups come in the order of `Wave.groups`."""

    def before(self, group: Group, rows: Rows, cells: Tensor) -> None:
        """Bring what the segments before have left into the inputs of a group's layers.

        Args:
            group: the cells.
            rows: their layers.
            cells: `[cells, T, d]`, changed in place.
        """
        ...

    def after(self, group: Group, cells: Tensor) -> None:
        """Take what the next segments get from the outputs `[cells, T, d]` of a group's layers."""
        ...


class Recurrence(Protocol[R]):
    """What flows from segment to segment: in waves by `WaveState`, in tails layer by layer.

    Attributes:
        flow: where what a cell gets comes from.
        rows_around: `[prefix + suffix, d]`, embeddings of the rows around a segment's tokens; zero where a
            state takes their place.
    """

    flow: Flow

    @property
    def rows_around(self) -> Tensor: ...

    def wave_state(self, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor) -> WaveState:
        """What flows through a wave over all its cells `[segments, T, d]`."""
        ...

    def build_metadata(self, rows: TailRows, pages: LayerPages | None) -> R:
        """What the tails of a step need to know, on the device; made once a step.

        Args:
            rows: of the tails.
            pages: those of any layer, as all lie alike; None where there are none.
        """
        ...

    def before_tails(self, metadata: R, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        """Bring what the segments before have left into a layer's inputs `[rows, d]`, in place."""
        ...

    def after_tails(self, metadata: R, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        """Leave what the next segments get, from a layer's outputs `[rows, d]`, in the pages of closed ones."""
        ...
