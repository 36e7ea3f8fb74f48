"""Which rows of open segments read and write which memory, on the device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.upload import upload


@dataclass(frozen=True)
class Reads:
    """Pieces of one width that read a memory.

    Attributes:
        width: rows of a piece.
        rows: `[pieces, width]`, local rows; None where they are all local rows, in order.
        pages: `[pieces]`, pages of what they read.
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
        pages: `[pieces]`, where the memory goes.
        read_pages: `[pieces]`, the memory before; not one where `first`.
        first: bool `[pieces]`, whether it is its document's very first segment.
    """

    rows: Tensor
    pages: Tensor
    read_pages: Tensor
    first: Tensor


def index_reads(rows: LocalRows) -> list[Reads]:
    """By width, 1 first; pieces of first segments read nothing."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for i, (piece, width) in enumerate(zip(rows.pieces, rows.widths, strict=True)):
        if piece.segment > 0:
            by_width[width].append(i)
    reads = []
    for width in sorted(by_width):
        members = by_width[width]
        pages = rows.pages(members, ahead=-1)
        if len(members) == len(rows.pieces):
            reads.append(Reads(width, None, pages))
            continue
        (local,) = upload([[rows.starts[i] + j for i in members for j in range(width)]], rows.device)
        reads.append(Reads(width, local.view(-1, width), pages))
    return reads


def index_closings(rows: LocalRows) -> Closings | None:
    """The segments that end here; None if none does."""
    if not rows.closing:
        return None
    first = [int(rows.pieces[i].segment == 0) for i in rows.closing]
    local, first_ = upload([rows.suffix_rows(rows.closing), first], rows.device)
    # a first segment has none before it; the page of any other that it does not read is as good
    read_pages = torch.where(first_.bool(), 0, rows.pages(rows.closing, ahead=-1))
    return Closings(local.view(len(first), -1), rows.pages(rows.closing), read_pages, first_.bool())
