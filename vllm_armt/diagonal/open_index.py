"""The rows of open segments with their integers on the device: which row reads, sees and writes what.

Local rows are the tokens of the pieces, each piece followed by its m memory tokens if it closes its
segment. All of it is computed once a step and used at every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.diagonal.attention import past_mask
from vllm_armt.diagonal.plan import OpenPiece
from vllm_armt.diagonal.stack import upload


@dataclass(frozen=True)
class Batch:
    """Pieces of similar length that run as one padded batch where rows must be kept apart.

    Padding repeats a piece's last row; it comes after the valid rows, so nothing valid sees it.

    Attributes:
        gather: `[pieces, width]`, local rows.
        valid: `[rows]`, the places of `gather`, flattened, that are not padding; their local rows are `rows`.
        read_pages: `[pieces]`, pages of the memory that they read; None in first segments.
        past_pages: `[pieces]`, pages with the earlier keys of their segments; None where there are none.
        past_width: columns of the pages that are needed.
        mask: bool `[pieces, width, past_width + width]`, with `past_pages`.
    """

    gather: Tensor
    valid: Tensor
    rows: Tensor
    read_pages: Tensor | None
    past_pages: Tensor | None
    past_width: int
    mask: Tensor | None

    def padded(self, x: Tensor) -> Tensor:
        """`[local rows, *] -> [pieces, width, *]`."""
        return x[self.gather]

    def scatter(self, target: Tensor, padded: Tensor) -> None:
        """Put the valid rows of `[pieces, width, *]` into their places in `[local rows, *]`."""
        target[self.rows] = padded.flatten(0, 1)[self.valid]


@dataclass(frozen=True)
class Stores:
    """Where the keys and values of segments that stay open go.

    Attributes:
        opened_pages: `[opened]`, pages of the segments that begin here.
        rows, pages, columns: `[stored rows]`, local rows and their places.
    """

    opened_pages: Tensor
    rows: Tensor
    pages: Tensor
    columns: Tensor


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
        batches: cover every local row once.
        stores: None if no segment stays open, or without pages.
        closings: None if no segment ends here.
    """

    tokens: Tensor
    out_local: Tensor
    out_rows: Tensor
    positions: Tensor
    batches: list[Batch]
    stores: Stores | None
    closings: Closings | None

    @classmethod
    def build(cls, pieces: Sequence[OpenPiece], m: int, block_table: Tensor | None, device: torch.device) -> OpenIndex:
        """Upload pieces; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        return _Builder(pieces, m, block_table, device).index()


class _Builder:
    """Lays out the local rows of some pieces, and uploads what refers to them."""

    def __init__(self, pieces: Sequence[OpenPiece], m: int, block_table: Tensor | None, device: torch.device) -> None:
        self.m = m
        self.block_table = block_table
        self.device = device
        self.starts: dict[OpenPiece, int] = {}
        rows = 0
        for piece in pieces:
            self.starts[piece] = rows
            rows += self._width(piece)

    def index(self) -> OpenIndex:
        tokens: list[int] = []
        out_local: list[int] = []
        positions: list[int] = []
        kinds: dict[tuple[int, bool, bool], list[OpenPiece]] = defaultdict(list)
        for piece, start in self.starts.items():
            out_local += range(start, start + piece.n)
            tokens += range(self.m + piece.row, self.m + piece.row + piece.n)
            tokens += range(self.m if piece.closes else 0)
            positions += range(piece.offset, piece.offset + self._width(piece))
            kinds[self._width(piece).bit_length(), piece.segment > 0, piece.offset > 0].append(piece)
        tokens_, out_local_, positions_ = upload([tokens, out_local, positions], self.device)
        staying = [piece for piece in self.starts if not piece.closes]
        closing = [piece for piece in self.starts if piece.closes]
        return OpenIndex(
            tokens_,
            out_local_,
            tokens_[out_local_] - self.m,
            positions_,
            [self._batch(members) for members in kinds.values()],
            self._stores(staying) if staying and self.block_table is not None else None,
            self._closings(closing) if closing else None,
        )

    def _batch(self, pieces: list[OpenPiece]) -> Batch:
        """Pieces of one kind: all or none read a memory, all or none have a past."""
        widths = [self._width(piece) for piece in pieces]
        width, past_width = max(widths), max(piece.offset for piece in pieces)
        starts = [self.starts[piece] for piece in pieces]
        gather = [start + min(i, w - 1) for start, w in zip(starts, widths, strict=True) for i in range(width)]
        valid = [p * width + i for p, w in enumerate(widths) for i in range(w)]
        past = [piece.offset for piece in pieces]
        gather_, valid_, past_, requests, segments = upload([gather, valid, past, *_columns(pieces)], self.device)
        return Batch(
            gather_.view(-1, width),
            valid_,
            gather_[valid_],
            self._pages(requests, segments - 1) if pieces[0].segment > 0 else None,
            self._pages(requests, segments) if past_width else None,
            past_width,
            past_mask(past_, past_width, width) if past_width else None,
        )

    def _stores(self, pieces: list[OpenPiece]) -> Stores:
        opened = [piece for piece in pieces if piece.offset == 0]
        rows = [self.starts[piece] + i for piece in pieces for i in range(piece.n)]
        columns = [piece.offset + i for piece in pieces for i in range(piece.n)]
        owners = [piece for piece in pieces for _ in range(piece.n)]
        rows_, columns_, requests, segments, opened_requests, opened_segments = upload(
            [rows, columns, *_columns(owners), *_columns(opened)], self.device
        )
        return Stores(self._pages(opened_requests, opened_segments), rows_, self._pages(requests, segments), columns_)

    def _closings(self, pieces: list[OpenPiece]) -> Closings:
        rows = [self.starts[piece] + piece.n + j for piece in pieces for j in range(self.m)]
        rows_, requests, segments = upload([rows, *_columns(pieces)], self.device)
        return Closings(
            rows_.view(-1, self.m),
            self._pages(requests, segments),
            self._pages(requests, (segments - 1).clamp(min=0)),
            segments == 0,
        )

    def _pages(self, requests: Tensor, segments: Tensor) -> Tensor:
        assert self.block_table is not None, "only a document's first tokens can do without pages"
        return self.block_table[requests, segments]

    def _width(self, piece: OpenPiece) -> int:
        """Rows of a piece, memory tokens included."""
        return piece.n + (self.m if piece.closes else 0)


def _columns(pieces: list[OpenPiece]) -> tuple[list[int], list[int]]:
    """Where the block table has the pages of pieces: requests and segments."""
    return [piece.request for piece in pieces], [piece.segment for piece in pieces]
