"""Tails: in which order the rows of a step's tails lie, and in which pages their keys are.

Python looks at tails, never at single rows, of which a step may have thousands: what is known of tails are arrays
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
    """The concatenation of `range(start, start + count)` over `starts` `[n]` and `counts` `[n]`: `[sum(counts)]`."""
    ends = counts.cumsum()
    return (starts - ends + counts).repeat(counts) + np.arange(ends[-1])


def padded(counts: Integers) -> Integers:
    """`[n, max(counts)]`: a row `range(count)` for each of `counts` `[n]`, padded with its last value."""
    return np.minimum(np.arange(counts.max()), counts[:, None] - 1)


@dataclass(frozen=True)
class Places:
    """Where the keys of rows lie in the pages of their segments.

    Attributes:
        table: int32 `[tails, n]`, the pages of their segments up to these rows, padded with the last one.
        rows: int64 `[r]`, rows of `TailRows`; pages, columns: where the key of each lies.
        cleared: pages that are first written here; None if there is none.
    """

    table: Tensor
    rows: Tensor
    pages: Tensor
    columns: Tensor
    cleared: Tensor | None


class TailRows:
    """The rows of all tails of a step: of each its prefix if it opens the segment, tokens, and suffix if it closes it.

    A decoded token that is not the last of its segment is one row; one that closes a segment of an ARMT is 1 + m.


    Attributes:
        tails: in the order of their rows.
        layout: the rows of a segment.
        requests, segments, inputs: int64 `[tails]` on the host: request, segment, and first row in the step's input.
        opens, closes: bool `[tails]`, whether they hold a segment's first and its last token.
        counts: int64 `[3, tails]`, rows of each kind: `prefixes`, `tokens` and `suffixes`.
        widths, starts: int64 `[tails]`, number of rows, and the first of them.
        pasts: int64 `[tails]`, rows of the segment that earlier steps computed, whose keys are in pages.
        block_table: int32 `[requests, segments]` on the device; None where there are no pages.
        device: of everything that is uploaded.
    """

    def __init__(
        self, tails: Sequence[Tail], layout: SegmentLayout, block_table: Tensor | None, device: torch.device
    ) -> None:
        self.tails = tails
        self.layout = layout
        # the fields of a tail, in their order
        fields: Integers = np.array(tails, dtype=np.int64)
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
        """Rows of prefixes."""
        return ranges(self.starts, self.prefixes)

    @property
    def token_rows(self) -> Integers:
        """Rows of tokens."""
        return ranges(self.starts + self.prefixes, self.tokens)

    @property
    def suffix_rows(self) -> Integers:
        """Rows of suffixes."""
        return ranges(self.starts + self.widths - self.suffixes, self.suffixes)

    @property
    def positions(self) -> Integers:
        """int64 `[rows]`: the position of each row, as `SegmentLayout.positions` has it."""
        begin = self.segments * self.layout.stride
        first = begin + self.pasts + self.prefixes
        wrapped = self.layout.suffix_position
        return self.numbered(begin, first, first + self.tokens if wrapped is None else begin + wrapped)

    def numbered(self, prefix: int | Integers, tokens: Integers, suffix: int | Integers) -> Integers:
        """int64 `[rows]`: the rows of each tail count up from `prefix`, `tokens` and `suffix`, by kind."""
        firsts = np.empty_like(self.counts)
        firsts[0], firsts[1], firsts[2] = prefix, tokens, suffix
        return ranges(firsts.T.ravel(), self.counts.T.ravel())

    def pages(self, tails: Integers, ahead: int | Integers = 0) -> Tensor:
        """Block ids of `tails` (indices) at column `segment + ahead` of their block tables, int32 `[tails]`."""
        assert self.block_table is not None, "only a document's first tokens can do without pages"
        requests, columns = upload([self.requests[tails], self.segments[tails] + ahead], self.device)
        return self.block_table[requests, columns]

    def table(self, tails: Integers, counts: Integers) -> Tensor:
        """The first `counts` `[tails]` pages of each segment, int32 `[tails, max(counts)]`, padded with the last.

        Where there are no pages: 0, 1, 2 and so on, pages of a scratch pool.
        """
        ahead = padded(counts)
        if self.block_table is None:
            return torch.arange(ahead.size, dtype=torch.int32, device=self.device).view(ahead.shape)
        return self.pages(tails.repeat(ahead.shape[1]), ahead.ravel()).view(ahead.shape)

    def places(self, tails: Integers, counts: Integers, columns: int) -> Places:
        """Where the keys of the first `counts` `[tails]` rows of each tail go, in pages of `columns` keys."""
        pasts = self.pasts[tails]
        table = self.table(tails, -(-(pasts + counts) // columns))
        # counted as if the pages of the table were concatenated
        firsts = np.arange(0, table.numel(), table.shape[1]) * columns + pasts
        entries, within = np.divmod(ranges(firsts, counts), columns)
        rows, entries_, within_, new = upload(
            [ranges(self.starts[tails], counts), entries, within, entries[within == 0]], self.device
        )
        pages = table.flatten()
        return Places(table, rows, pages[entries_], within_, pages[new] if len(new) else None)
