"""Segment arithmetic: which parts of which segments a run of tokens covers, and which memories are kept.

Token t of a document belongs to segment t // S. Everything here is host integers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """The tokens `[offset, offset + n)` of one segment."""

    segment: int
    offset: int
    n: int

    def closes(self, segment_size: int) -> bool:
        """Whether the piece ends its segment, so that the segment's memory is written."""
        return self.offset + self.n == segment_size

    def is_whole(self, segment_size: int) -> bool:
        """Whether the piece is the whole segment, which needs no KV cache."""
        return self.n == segment_size


def split_chunk(start: int, end: int, segment_size: int) -> list[Piece]:
    """The pieces of tokens `[start, end)`, in order; at most the first and the last are not whole."""
    pieces = []
    while start < end:
        segment, offset = divmod(start, segment_size)
        n = min(segment_size - offset, end - start)
        pieces.append(Piece(segment, offset, n))
        start += n
    return pieces


def kept_segments(end: int, segment_size: int) -> tuple[int, int]:
    """The two segments whose pages hold something once the tokens `[0, end)` are computed.

    A chunk that ends inside a segment keeps the memory after the last closed segment and the KV of
    the open one. A chunk that ends on a boundary keeps the last two memories: a prefix-cache lookup
    must leave one token to compute, so the same prompt asked again resumes one segment earlier.
    The allocator and the executor both follow this rule: a page is real exactly when it is written.

    Returns:
        Two consecutive segment indices; the first may be -1, which stands for the empty memory.
    """
    last = (end - 1) // segment_size
    return last - 1, last
