"""Memory that travels in the token stream: which rows of open segments it takes, and in which pages it is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_armt.core.pages import LayerPages
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.upload import upload
from vllm_armt.recurrence.armt_reads import memory_pages


@dataclass(frozen=True)
class Segments:
    """Segments that take over a memory.

    Attributes:
        pages: `[n]`, their own; None where there are no pages.
        read_pages: `[n]`, those of the segments before; not one where `first`. None where there are no pages.
        first: bool `[n]`, whether it is its document's very first segment.
    """

    pages: Tensor | None
    read_pages: Tensor | None
    first: Tensor

    def read(self, initial: Tensor, pages: Sequence[LayerPages] | None, layer: int) -> Tensor:
        """`[n, m, d]`: `initial` `[m, d]` for first segments, else what the segment before left at a layer."""
        memory = initial.expand(len(self.first), -1, -1)
        if self.read_pages is None:
            return memory
        assert pages is not None
        stored = pages[layer].state["memory"][self.read_pages]
        return torch.where(self.first[:, None, None], memory.to(stored.dtype), stored)


@dataclass(frozen=True)
class Carried:
    """Memory in the tails of a step.

    Attributes:
        opening, closing: segments that begin and that end here; None if none does.
        prefix, suffix: `[n * m]`, rows of the memory of `opening` and of `closing`.
    """

    opening: Segments | None
    closing: Segments | None
    prefix: Tensor
    suffix: Tensor


def build_carried(rows: TailRows) -> Carried:
    """Where the memory of a step's tails is."""
    prefix, suffix = upload([rows.prefix_rows, rows.suffix_rows], rows.device)
    return Carried(_segments(rows, rows.opens), _segments(rows, rows.closes), prefix, suffix)


def _segments(rows: TailRows, chosen: NDArray[np.bool_]) -> Segments | None:
    """Of the tails that are chosen; None if none is."""
    tails = np.flatnonzero(chosen)
    if not len(tails):
        return None
    if rows.block_table is None:
        return Segments(None, None, torch.ones(len(tails), dtype=torch.bool, device=rows.device))
    return Segments(*memory_pages(rows, tails))
