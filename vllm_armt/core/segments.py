"""Segment arithmetic: the rows of a segment, where a document's segments lie, and which of its pages hold something.

Everything here is host integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

Window = Literal["all", "tokens", "rows"]
"""What a segment sees of the tokens of the one before: "all" of them ("Transformer-XL"); or a window that slides with
the "tokens" (token i those from the i-th on, the prefix none, the suffix all), or with the "rows" (row x of a segment
those from the x-th on, so that a suffix behind S tokens sees none; the prefix none)."""


@dataclass(frozen=True)
class SegmentLayout:
    """The rows of one segment at one layer: prefix, tokens, suffix.

    Attributes:
        prefix: rows before the tokens: RMT's and PRMT's read memory (m), or the sink (1) of an ARMT.
        tokens: S; a text's last segment and an early closed one have fewer.
        suffix: m, the memory tokens that end a segment and write its memory.
        suffix_position: position of the suffix, where it has learned ones of its own (`wrap_pos`); None
            where it follows the tokens.
        stride: what the positions of one segment are further than those of the one before; 0 where they
            start anew.
        full_suffix: every row of the suffix sees all of it; otherwise those before and itself, as all rows do.
    """

    prefix: int
    tokens: int
    suffix: int
    suffix_position: int | None = None
    stride: int = 0
    full_suffix: bool = False

    @property
    def rows(self) -> int:
        """T, the rows of a whole segment."""
        return self.prefix + self.tokens + self.suffix

    def positions(self, segment: int, offset: int, n: int, closes: bool) -> list[int]:
        """Positions of the rows of tokens `[offset, offset + n)` of a segment.

        The prefix comes before the segment's first token, the suffix after the last if it `closes`.
        """
        begin = segment * self.stride
        first = begin + self.prefix + offset
        positions = list(range(begin, first) if offset == 0 else ()) + list(range(first, first + n))
        if closes:
            suffix = first + n if self.suffix_position is None else begin + self.suffix_position
            positions += range(suffix, suffix + self.suffix)
        return positions


class Piece(NamedTuple):
    """The tokens `[offset, offset + n)` of one segment; `closes` if they end it, so that its memory is written."""

    segment: int
    offset: int
    n: int
    closes: bool

    @property
    def is_whole(self) -> bool:
        """Whether the piece is all of its segment, which needs no KV cache."""
        return self.offset == 0 and self.closes


@dataclass(frozen=True)
class Segmentation:
    """Where the segments of a document lie.

    Attributes:
        size: tokens of a segment.
        lead: tokens that the first segment has fewer.
        last: the segment that never closes: it holds all tokens from its first one on, however many. None
            if there is none, so that every full segment is written to memory.
    """

    size: int
    lead: int = 0
    last: int | None = None

    @classmethod
    def of_prompt(cls, segment_size: int, alignment: str, stays_open: bool, num_prompt_tokens: int) -> Self:
        """The segmentation of a request.

        Args:
            segment_size: S.
            alignment: "left": segments are counted from the first token; "right": back from the prompt's
                last, so that the first segment may be short; "center": as few as with "left", of nearly
                equal length (`torch.chunk` of the authors' code).
            stays_open: whether the prompt's last segment stays open (generation policy "open").
            num_prompt_tokens: at least 1; only what stays open or is not aligned to the left depends on it.
        """
        size, lead = segment_size, 0
        if alignment == "right":
            lead = -num_prompt_tokens % segment_size
        elif alignment == "center":
            size = -(-num_prompt_tokens // -(-num_prompt_tokens // segment_size))
        return cls(size, lead, (num_prompt_tokens - 1 + lead) // size if stays_open else None)

    def segment(self, token: int) -> int:
        """The segment of a token."""
        segment = (token + self.lead) // self.size
        return segment if self.last is None else min(segment, self.last)

    def begin(self, segment: int) -> int:
        """The first token of a segment."""
        return max(segment * self.size - self.lead, 0)

    def end(self, token: int) -> int | None:
        """Where the segment of `token` ends: its first token beyond; None if it never does."""
        segment = self.segment(token)
        return None if segment == self.last else self.begin(segment + 1)

    def split(self, start: int, end: int) -> list[Piece]:
        """The pieces of tokens `[start, end)`, in order; at most the first and the last are not whole."""
        pieces = []
        segment = self.segment(start)
        while start < end:
            beyond = None if segment == self.last else self.begin(segment + 1)
            stop = end if beyond is None else min(beyond, end)
            pieces.append(Piece(segment, start - self.begin(segment), stop - start, stop == beyond))
            start, segment = stop, segment + 1
        return pieces

    def closed(self, tokens: int) -> int:
        """How many segments the first `tokens` tokens close."""
        closed = self.closed_tokens(tokens)
        return self.segment(closed - 1) + 1 if closed else 0

    def closed_tokens(self, tokens: int) -> int:
        """How many of the first `tokens` tokens lie in closed segments."""
        if tokens == 0:
            return 0
        beyond = self.end(tokens - 1)
        return tokens if tokens == beyond else self.begin(self.segment(tokens - 1))

    def retained(self, end: int, page_tokens: int) -> range:
        """The columns whose pages hold something once the tokens `[0, end)` are computed.

        A chunk that ends inside a segment keeps the memory after the last closed segment and the KV of
        the open one. A chunk that ends on a boundary keeps the last two memories: a prefix-cache lookup
        must leave one token to compute, so the same prompt asked again resumes one segment earlier. A
        segment that never closes takes a further column for every `page_tokens` of its tokens.
        The allocator and the executor both follow this rule: a page is real exactly when it is written.

        Returns:
            Consecutive columns; the first may be -1, which stands for the empty memory.
        """
        segment = self.segment(end - 1)
        more = (end - 1 - self.begin(segment)) // page_tokens if segment == self.last else 0
        return range(segment - 1, segment + more + 1)

    def room(self, end: int, page_tokens: int) -> int:
        """How many tokens can be computed before columns are kept behind those of the tokens `[0, end)`."""
        segment = self.segment(end - 1)
        if segment != self.last:
            return self.begin(segment + 1)
        return self.begin(segment) + (self.retained(end, page_tokens).stop - segment) * page_tokens
