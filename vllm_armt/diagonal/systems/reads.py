"""Which rows of open segments read and write which memory, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_armt.diagonal.local_rows import Integers, LocalRows
from vllm_armt.diagonal.upload import upload


@dataclass(frozen=True)
class Reads:
    """Pieces of one width that read a memory.

    Attributes:
        width: rows of a piece.
        rows: `[pieces, width]`, local rows; None where they are all local rows, in order.
        pages: int64 `[pieces]`, pages of what they read.
    """

    width: int
    rows: Tensor | None
    pages: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """`[local rows, *] -> [pieces, width, *]`."""
        return x.unflatten(0, (-1, self.width)) if self.rows is None else x[self.rows]

    def add(self, x: Tensor, A: Tensor) -> None:
        """Add `[pieces, width, *]` to their places in `[local rows, *]`."""
        if self.rows is None:
            x += A.flatten(0, 1)
        else:
            x[self.rows] += A


@dataclass(frozen=True)
class Closings:
    """Segments that end here.

    Attributes:
        rows: `[pieces, m]`, local rows of their memory tokens.
        pages: int64 `[pieces]`, where the memory goes.
        read_pages: int64 `[pieces]`, the memory before; not one where `first`.
        first: bool `[pieces]`, whether it is its document's very first segment; None if none is.
    """

    rows: Tensor
    pages: Tensor
    read_pages: Tensor
    first: Tensor | None


def index_reads(rows: LocalRows) -> list[Reads]:
    """By width, 1 first; pieces of first segments read nothing."""
    reading = np.flatnonzero(rows.segments > 0)
    widths = rows.widths[reading]
    reads = []
    for width in np.unique(widths).tolist():
        members = reading[widths == width]
        # every layer looks them up, and takes no other integers without converting them
        pages = rows.pages(members, ahead=-1).long()
        if len(members) == len(rows.pieces):
            reads.append(Reads(width, None, pages))
            continue
        (local,) = upload([rows.starts[members, None] + np.arange(width)], rows.device)
        reads.append(Reads(width, local.view(-1, width), pages))
    return reads


def index_closings(rows: LocalRows) -> Closings | None:
    """The segments that end here; None if none does."""
    closing = np.flatnonzero(rows.closes)
    if not len(closing):
        return None
    (local,) = upload([rows.suffix_rows], rows.device)
    pages, read_pages, first = memory_pages(rows, closing)
    any_first = (rows.segments[closing] == 0).any()
    return Closings(local.view(len(closing), -1), pages.long(), read_pages.long(), first if any_first else None)


def memory_pages(rows: LocalRows, pieces: Integers) -> tuple[Tensor, Tensor, Tensor]:
    """Of the segments of pieces, `[pieces]` each: their own pages, those before, and bool, whether they are first."""
    first = rows.segments[pieces] == 0
    (first_,) = upload([first], rows.device)
    # a first segment has none before it; its own page, which it does not read, is as good
    return rows.pages(pieces), rows.pages(pieces, np.where(first, 0, -1)), first_.bool()
