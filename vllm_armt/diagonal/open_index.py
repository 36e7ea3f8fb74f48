"""The rows of open segments with their integers on the device: which row reads and writes which memory.

All of it is computed once a step and used at every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_armt.diagonal.attention import Attention
from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.plan import OpenPiece
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


@dataclass(frozen=True)
class OpenIndex:
    """The open pieces of a step.

    Attributes:
        tokens: `[local rows]`, rows of the m memory tokens followed by the step's input.
        out_local, out_rows: local rows of real tokens, and their rows in the step's input.
        positions: `[local rows]`, positions inside the segment.
        reads: by width, 1 first; pieces of first segments read nothing.
        attention: what the backend of attention needs to know.
        closings: None if no segment ends here.
    """

    tokens: Tensor
    out_local: Tensor
    out_rows: Tensor
    positions: Tensor
    reads: list[Reads]
    attention: Any
    closings: Closings | None

    @classmethod
    def build(
        cls,
        pieces: Sequence[OpenPiece],
        m: int,
        attention: Attention,
        block_table: Tensor | None,
        device: torch.device,
    ) -> OpenIndex:
        """Upload pieces; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        rows = LocalRows(pieces, m, block_table, device)
        tokens: list[int] = []
        out_local: list[int] = []
        for piece, start in zip(pieces, rows.starts, strict=True):
            out_local += range(start, start + piece.n)
            tokens += range(m + piece.row, m + piece.row + piece.n)
            tokens += range(m if piece.closes else 0)
        tokens_, out_local_, positions_ = upload([tokens, out_local, rows.columns], device)
        return cls(
            tokens_,
            out_local_,
            tokens_[out_local_] - m,
            positions_,
            _reads(rows),
            attention.index(rows),
            _closings(rows),
        )


def _reads(rows: LocalRows) -> list[Reads]:
    by_width: dict[int, list[int]] = defaultdict(list)
    for i, (piece, width) in enumerate(zip(rows.pieces, rows.widths, strict=True)):
        if piece.segment > 0:
            by_width[width].append(i)
    reads = []
    for width in sorted(by_width):
        members = by_width[width]
        pages = rows.pages(members, back=1)
        if len(members) == len(rows.pieces):
            reads.append(Reads(width, None, pages))
            continue
        (local,) = upload([[rows.starts[i] + j for i in members for j in range(width)]], rows.device)
        reads.append(Reads(width, local.view(-1, width), pages))
    return reads


def _closings(rows: LocalRows) -> Closings | None:
    closing = [i for i, piece in enumerate(rows.pieces) if piece.closes]
    if not closing:
        return None
    local = [rows.starts[i] + rows.pieces[i].n + j for i in closing for j in range(rows.m)]
    first = [int(rows.pieces[i].segment == 0) for i in closing]
    local_, first_ = upload([local, first], rows.device)
    # a first segment has none before it; its own page is as good as any other that it does not read
    read_pages = torch.where(first_.bool(), 0, rows.pages(closing, back=1))
    return Closings(local_.view(-1, rows.m), rows.pages(closing), read_pages, first_.bool())
