"""Local rows: how the rows of a step's open pieces lie behind one another, and where their pages are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from vllm_armt.core import Cell
from vllm_armt.diagonal.plan import OpenPiece
from vllm_armt.diagonal.upload import upload


class LocalRows:
    """The rows of the pieces: prefix where a segment begins, tokens, suffix where it closes.

    Attributes:
        pieces: in the order of their rows.
        cell: the rows of a segment.
        widths, starts: of each piece, its rows and the first of them.
        block_table: int32 `[requests, segments]` on the device; None where there are no pages.
        device: of everything that is uploaded.
    """

    def __init__(
        self, pieces: Sequence[OpenPiece], cell: Cell, block_table: Tensor | None, device: torch.device
    ) -> None:
        self.pieces = pieces
        self.cell = cell
        self.widths = [self.prefix(i) + piece.n + self.suffix(i) for i, piece in enumerate(pieces)]
        self.starts = list(accumulate(self.widths, initial=0))[:-1]
        self.block_table = block_table
        self.device = device

    def __len__(self) -> int:
        return sum(self.widths)

    def prefix(self, i: int) -> int:
        """Rows of piece i before its tokens."""
        return self.cell.prefix if self.pieces[i].offset == 0 else 0

    def suffix(self, i: int) -> int:
        """Rows of piece i behind its tokens."""
        return self.cell.suffix if self.pieces[i].closes else 0

    def past(self, i: int) -> int:
        """Earlier rows of piece i's segment, which have their keys in pages."""
        offset = self.pieces[i].offset
        return self.cell.prefix + offset if offset else 0

    def prefix_rows(self, pieces: Sequence[int]) -> list[int]:
        """Local rows of the prefixes of pieces that have one."""
        return [self.starts[i] + j for i in pieces for j in range(self.prefix(i))]

    def suffix_rows(self, pieces: Sequence[int]) -> list[int]:
        """Local rows of the suffixes of pieces that have one."""
        return [self.starts[i] + self.widths[i] - self.suffix(i) + j for i in pieces for j in range(self.suffix(i))]

    def pages(self, pieces: Sequence[int], ahead: int | Sequence[int] = 0) -> Tensor:
        """The page ids of pieces, by their indices: of their own segments, or of columns so many `ahead`."""
        assert self.block_table is not None, "only a document's first tokens can do without pages"
        aheads = [ahead] * len(pieces) if isinstance(ahead, int) else ahead
        requests, columns = upload(
            [
                [self.pieces[i].request for i in pieces],
                [self.pieces[i].segment + a for i, a in zip(pieces, aheads, strict=True)],
            ],
            self.device,
        )
        return self.block_table[requests, columns]

    @cached_property
    def columns(self) -> list[int]:
        """By local row, its place among the rows of its segment."""
        return [column for i, width in enumerate(self.widths) for column in range(self.past(i), self.past(i) + width)]

    @cached_property
    def positions(self) -> list[int]:
        """By local row, its position."""
        return [
            position
            for piece in self.pieces
            for position in self.cell.positions(piece.segment, piece.offset, piece.n, piece.closes)
        ]

    @cached_property
    def opening(self) -> list[int]:
        """The pieces that begin a segment."""
        return [i for i, piece in enumerate(self.pieces) if piece.offset == 0]

    @cached_property
    def closing(self) -> list[int]:
        """The pieces that end a segment."""
        return [i for i, piece in enumerate(self.pieces) if piece.closes]
