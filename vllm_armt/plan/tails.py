"""Local rows: how the rows of a step's open pieces lie behind one another, and where their pages are.

Python looks at pieces, never at single rows, of which a step may have thousands: what is known of pieces are arrays
on the host, and what is known of rows is counted from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_armt.core import SegmentLayout
from vllm_armt.plan.step import Tail
from vllm_armt.plan.upload import upload

Integers = NDArray[np.int64]


def ranges(starts: Integers, counts: Integers) -> Integers:
    """The integers from each of `starts` `[n]` on, as many as `counts` `[n]` says, one range behind another."""
    ends = counts.cumsum()
    return (starts - ends + counts).repeat(counts) + np.arange(ends[-1])


def padded(counts: Integers) -> Integers:
    """`[n, max(counts)]`: 0, 1 and so on below each of `counts` `[n]`, the last one repeated."""
    return np.minimum(np.arange(counts.max()), counts[:, None] - 1)


@dataclass(frozen=True)
class Places:
    """Where the keys of rows lie in the pages of their segments.

    Attributes:
        table: `[pieces, n]`, the pages of their segments up to these rows; a last one stands for those not there.
        rows, pages, columns: `[rows]`, local rows and their places.
        cleared: pages that are first written here; None if there is none.
    """

    table: Tensor
    rows: Tensor
    pages: Tensor
    columns: Tensor
    cleared: Tensor | None


class TailRows:
    """The rows of the pieces: prefix where a segment begins, tokens, suffix where it closes.

    Attributes:
        pieces: in the order of their rows.
        layout: the rows of a segment.
        requests, segments, inputs: `[pieces]`, whose they are, which segment, and their first rows of the input.
        opens, closes: bool `[pieces]`, whether they begin and whether they end a segment.
        counts: `[3, pieces]`, their rows of each kind, which are `prefixes`, `tokens` and `suffixes`.
        widths, starts: `[pieces]`, their rows and the first of them.
        pasts: `[pieces]`, earlier rows of their segments, which have their keys in pages.
        block_table: int32 `[requests, segments]` on the device; None where there are no pages.
        device: of everything that is uploaded.
    """

    def __init__(
        self, pieces: Sequence[Tail], layout: SegmentLayout, block_table: Tensor | None, device: torch.device
    ) -> None:
        self.pieces = pieces
        self.layout = layout
        # the fields of a piece, in their order
        fields: Integers = np.array(pieces, dtype=np.int64)
        self.requests, self.segments, offsets, tokens, self.inputs, closes = fields.T
        self.opens, self.closes = offsets == 0, closes == 1
        self.counts = np.array([layout.prefix * self.opens, tokens, layout.suffix * self.closes])
        self.prefixes, self.tokens, self.suffixes = self.counts
        self.widths = self.counts.sum(axis=0)
        self.starts = self.widths.cumsum() - self.widths
        self.pasts = layout.prefix + offsets - self.prefixes
        self.block_table = block_table
        self.device = device

    def __len__(self) -> int:
        return int(self.widths.sum())

    @property
    def prefix_rows(self) -> Integers:
        """Local rows of prefixes."""
        return ranges(self.starts, self.prefixes)

    @property
    def token_rows(self) -> Integers:
        """Local rows of tokens."""
        return ranges(self.starts + self.prefixes, self.tokens)

    @property
    def suffix_rows(self) -> Integers:
        """Local rows of suffixes."""
        return ranges(self.starts + self.widths - self.suffixes, self.suffixes)

    @property
    def positions(self) -> Integers:
        """By local row, its position: `SegmentLayout.positions` of all pieces."""
        begin = self.segments * self.layout.stride
        first = begin + self.pasts + self.prefixes
        wrapped = self.layout.suffix_position
        return self.numbered(begin, first, first + self.tokens if wrapped is None else begin + wrapped)

    def numbered(self, prefix: int | Integers, tokens: Integers, suffix: int | Integers) -> Integers:
        """By local row, a number: each piece's prefix, tokens and suffix count on from these."""
        firsts = np.empty_like(self.counts)
        firsts[0], firsts[1], firsts[2] = prefix, tokens, suffix
        return ranges(firsts.T.ravel(), self.counts.T.ravel())

    def pages(self, pieces: Integers, ahead: int | Integers = 0) -> Tensor:
        """The page ids of pieces, by their indices: of their own segments, or of columns so many `ahead`."""
        assert self.block_table is not None, "only a document's first tokens can do without pages"
        requests, columns = upload([self.requests[pieces], self.segments[pieces] + ahead], self.device)
        return self.block_table[requests, columns]

    def table(self, pieces: Integers, counts: Integers) -> Tensor:
        """`[pieces, n]`: the first `counts` `[pieces]` pages of segments; a last one stands for those not there.

        Where there are no pages, those of a pool that nothing else uses, in order.
        """
        ahead = padded(counts)
        if self.block_table is None:
            return torch.arange(ahead.size, dtype=torch.int32, device=self.device).view(ahead.shape)
        return self.pages(pieces.repeat(ahead.shape[1]), ahead.ravel()).view(ahead.shape)

    def places(self, pieces: Integers, counts: Integers, columns: int) -> Places:
        """Where the keys of the first `counts` `[pieces]` rows of pieces go, in pages of so many columns."""
        pasts = self.pasts[pieces]
        table = self.table(pieces, -(-(pasts + counts) // columns))
        # counted as if the pages of the table lay one behind another
        firsts = np.arange(0, table.numel(), table.shape[1]) * columns + pasts
        entries, within = np.divmod(ranges(firsts, counts), columns)
        rows, entries_, within_, new = upload(
            [ranges(self.starts[pieces], counts), entries, within, entries[within == 0]], self.device
        )
        pages = table.flatten()
        return Places(table, rows, pages[entries_], within_, pages[new] if len(new) else None)
