"""What a segment looks like to a layer: its rows and their positions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """The rows of one segment at one layer: prefix, tokens, suffix.

    Attributes:
        prefix: rows before the tokens: RMT's and PRMT's read memory (m), or the sink (1) of a sliding window.
        tokens: S; a text's last segment and an early closed one have fewer.
        suffix: m, the memory tokens that end a segment and write its memory.
        suffix_position: position of the suffix, where it has learned ones of its own (`wrap_pos`); None
            where it follows the tokens.
        stride: what the positions of one segment are further than those of the one before; 0 where they
            start anew.
    """

    prefix: int
    tokens: int
    suffix: int
    suffix_position: int | None = None
    stride: int = 0

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
