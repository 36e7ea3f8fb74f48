"""Local rows: how the rows of a step's open pieces lie behind one another, and where their pages are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from vllm_armt.diagonal.plan import OpenPiece
from vllm_armt.diagonal.upload import upload


class LocalRows:
    """The tokens of the pieces, each piece followed by its m memory tokens if it closes its segment.

    Attributes:
        pieces: in the order of their rows.
        m: memory tokens.
        widths, starts: of each piece, its rows and the first of them.
        block_table: int32 `[requests, segments]` on the device; None where there are no pages.
        device: of everything that is uploaded.
    """

    def __init__(self, pieces: Sequence[OpenPiece], m: int, block_table: Tensor | None, device: torch.device) -> None:
        self.pieces = pieces
        self.m = m
        self.widths = [piece.n + (m if piece.closes else 0) for piece in pieces]
        self.starts = list(accumulate(self.widths, initial=0))[:-1]
        self.block_table = block_table
        self.device = device

    def __len__(self) -> int:
        return sum(self.widths)

    def pages(self, pieces: Sequence[int], back: int = 0) -> Tensor:
        """The page ids of pieces, by their indices: of their own segments, or of those `back` before."""
        assert self.block_table is not None, "only a document's first tokens can do without pages"
        requests, segments = upload(
            [[self.pieces[i].request for i in pieces], [self.pieces[i].segment - back for i in pieces]], self.device
        )
        return self.block_table[requests, segments]

    @cached_property
    def columns(self) -> list[int]:
        """By local row, its column in the segment; memory tokens come behind the last token."""
        return [
            column
            for piece, width in zip(self.pieces, self.widths, strict=True)
            for column in range(piece.offset, piece.offset + width)
        ]

    @cached_property
    def opening(self) -> list[int]:
        """The pieces that begin a segment."""
        return [i for i, piece in enumerate(self.pieces) if piece.offset == 0]
