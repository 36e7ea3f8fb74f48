"""Which rows of open segments read and write which memory, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_armt.plan.tails import Integers, TailRows
from vllm_armt.plan.upload import upload

COPIES = 32
"""Memories that are copied at a time. Requests that began together end their segments in one step; however many there
are, that takes no more of the device's memory, of which vLLM gives nearly all that profiling leaves to pages."""


@dataclass(frozen=True)
class Reads:
    """Pieces of one width that read a memory.

    Attributes:
        width: rows of a tail.
        rows: `[tails, width]`; None where they are all rows of the step's tails, in order.
        pages: int64 `[tails]`, pages of what they read.
    """

    width: int
    rows: Tensor | None
    pages: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """`[rows, *] -> [tails, width, *]`."""
        return x.unflatten(0, (-1, self.width)) if self.rows is None else x[self.rows]

    def add(self, x: Tensor, A: Tensor) -> None:
        """Add `[tails, width, *]` to their places in `[rows, *]`."""
        if self.rows is None:
            x += A.flatten(0, 1)
        else:
            x[self.rows] += A


@dataclass(frozen=True)
class Closings:
    """Segments that end here.

    Attributes:
        rows: `[tails, m]`, rows of their memory tokens.
        pages: int64 `[tails]`, where the memory goes.
        read_pages: int64 `[tails]`, the memory before; not one where `first`.
        first: bool `[tails]`, whether it is its document's very first segment; None if none is.
    """

    rows: Tensor
    pages: Tensor
    read_pages: Tensor
    first: Tensor | None


def build_reads(rows: TailRows) -> list[Reads]:
    """By width, 1 first, and of those that copy what they read COPIES at a time; first segments read nothing."""
    reading = np.flatnonzero(rows.segments > 0)
    widths = rows.widths[reading]
    reads = []
    for width in np.unique(widths).tolist():
        alike = reading[widths == width]
        for members in [alike] if width == 1 else _parts(alike):
            # every layer looks them up, and takes no other integers without converting them
            pages = rows.pages(members, ahead=-1).long()
            if len(members) == len(rows.tails):
                reads.append(Reads(width, None, pages))
                continue
            (local,) = upload([rows.starts[members, None] + np.arange(width)], rows.device)
            reads.append(Reads(width, local.view(-1, width), pages))
    return reads


def build_closings(rows: TailRows) -> list[Closings]:
    """The segments that end here, no more than COPIES at a time."""
    closings = []
    for closing in _parts(np.flatnonzero(rows.closes)):
        ends = rows.starts[closing] + rows.widths[closing]
        (local,) = upload([ends[:, None] + np.arange(-rows.layout.suffix, 0)], rows.device)
        pages, read_pages, first = memory_pages(rows, closing)
        any_first = (rows.segments[closing] == 0).any()
        local = local.view(len(closing), -1)
        closings.append(Closings(local, pages.long(), read_pages.long(), first if any_first else None))
    return closings


def _parts(tails: Integers) -> list[Integers]:
    """COPIES tails each, and the others; none of none."""
    return [tails[begin : begin + COPIES] for begin in range(0, len(tails), COPIES)]


def memory_pages(rows: TailRows, tails: Integers) -> tuple[Tensor, Tensor, Tensor]:
    """Of the segments of tails, `[tails]` each: their own pages, those before, and bool, whether they are first."""
    first = rows.segments[tails] == 0
    (first_,) = upload([first], rows.device)
    # a first segment has none before it; its own page, which it does not read, is as good
    return rows.pages(tails), rows.pages(tails, np.where(first, 0, -1)), first_.bool()
