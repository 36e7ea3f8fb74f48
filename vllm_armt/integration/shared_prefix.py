"""Texts that begin alike: which of them reads the common beginning, and where it stops for the others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

Hashes = Sequence[Hashable]
"""Of a text's segments, each of everything up to its end, as vLLM hashes blocks."""


@dataclass(frozen=True)
class _Leader:
    name: str
    end: int
    hashes: Hashes


class PrefixLeaders:
    """The texts that a step goes on reading, and those that wait for one of them.

    A chunk leaves its last memories only. So that a beginning is read once, however many texts have it, a leader's
    chunk ends where the longest beginning ends that a waiting text shares; that text then starts from the memory there.

    Args:
        is_kept: whether the prefix cache has the memory after the segment with this hash.

    Attributes:
        stops: by leader, the segment that its chunk must not read any more.
    """

    def __init__(self, is_kept: Callable[[Hashable], bool]) -> None:
        self._is_kept = is_kept
        self._by_next: dict[Hashable, _Leader] = {}
        self._begins: set[int] = set()
        self.stops: dict[str, int] = {}

    def add(self, name: str, begin: int, end: int, hashes: Hashes) -> None:
        """Note that a text is about to read, and to close, its segments from `begin` up to `end`."""
        if begin < end:
            # of two that go the same way one is enough
            self._by_next.setdefault(hashes[begin], _Leader(name, end, hashes))
            self._begins.add(begin)

    def serve(self, hashes: Hashes, end: int) -> bool:
        """Whether a text should wait, as a leader will leave a memory for it; the leader then stops there.

        Args:
            hashes: of the text.
            end: segments that it can take from others.
        """
        for begin in self._begins:
            # hashes are chained, so texts are the same up to the last segment with the same one
            leader = self._by_next.get(hashes[begin]) if begin < end else None
            if leader is None:
                continue
            common = _common(leader.hashes, hashes, begin, min(leader.end, end))
            if not self._is_kept(hashes[common - 1]):
                self.stops[leader.name] = min(common, self.stops.get(leader.name, common))
                return True
        return False


def _common(one: Hashes, other: Hashes, begin: int, end: int) -> int:
    """How many segments two texts have in common, more than `begin` and at most `end`."""
    return bisect_left(range(end), True, lo=begin, key=lambda i: one[i] != other[i])
