"""Tails as paged kernels want them: their keys are stored in pages, and read there where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.upload import upload


@dataclass(frozen=True)
class Paged:
    """Sequences that a kernel attends.

    Attributes:
        slots: int64 `[rows]`, page * columns + column of each row.
        starts: int32 `[sequences + 1]`, where each one's rows start.
        lengths: int32 `[sequences]`, keys of each one once its rows are stored.
        table: int32 `[sequences, pages]`, their pages; a segment that never closes has several.
        cleared: pages that are first written here; None if there is none.
    """

    slots: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor
    cleared: Tensor | None

    @classmethod
    def of(cls, rows: TailRows, columns: int) -> Self:
        """The tails of a step, in pages of `columns` keys."""
        places = rows.places(np.arange(len(rows.tails)), rows.widths, columns)
        starts, lengths = upload([np.append(rows.starts, len(rows)), rows.pasts + rows.widths], rows.device)
        slots = places.pages * columns + places.columns
        return cls(slots, starts.int(), lengths.int(), places.table, places.cleared)
