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
    begin: int
    end: int
    hashes: Hashes


@dataclass(eq=False)
class _Stop:
    """Where a leader is to leave a memory; one for all that wait for it.

    Attributes:
        leader: its name.
        end: segments before the memory.
        memory: the hash of all of them.
        checked: the last step in which the leader read and it was seen whether the memory is still to come.
        is_ahead: whether it was.
    """

    leader: str
    end: int
    memory: Hashable
    checked: int = -1
    is_ahead: bool = False


class PrefixLeaders:
    """The texts that a step goes on reading, and those that wait for one of them.

    A chunk leaves its last memories only. So that a beginning is read once, however many texts have it, a leader's
    chunk ends where the longest beginning ends that a waiting text shares; that text then starts from the memory there.

    Texts are compared once. What a text waits for is remembered from step to step, so one that goes on waiting costs
    the same whatever its length, and however many leaders there are.

    Args:
        find_memory: what the prefix cache has after the segment with this hash; nothing is false.

    Attributes:
        stops: by leader, the segment that its chunk must not read any more.
    """

    def __init__(self, find_memory: Callable[[Hashable], object]) -> None:
        self._find_memory = find_memory
        self._step = 0
        self._awaited: dict[str, _Stop] = {}
        self._stops: dict[tuple[str, Hashable], _Stop] = {}
        self._leaders: dict[str, _Leader] = {}
        self.begin_step()

    def begin_step(self) -> None:
        """Start a step, in which leaders are added and texts are served anew."""
        self._step += 1
        self._stops = {key: stop for key, stop in self._stops.items() if stop.leader in self._leaders}
        self._leaders = {}
        self._by_next: dict[Hashable, _Leader] = {}
        self._begins: set[int] = set()
        self._by_text: dict[Hashable, _Stop] = {}
        self.stops: dict[str, int] = {}

    def add(self, name: str, begin: int, end: int, hashes: Hashes) -> None:
        """Note that a text is about to read, and to close, its segments from `begin` up to `end`."""
        if begin < end:
            leader = self._leaders[name] = _Leader(name, begin, end, hashes)
            # of two that go the same way one is enough
            self._by_next.setdefault(hashes[begin], leader)
            self._begins.add(begin)

    def waits(self, name: str) -> bool:
        """Whether a text that was served, in this step or before, goes on waiting for the same memory."""
        stop = self._awaited.get(name)
        if stop is None:
            return False
        return stop.is_ahead if stop.checked == self._step else self._leads_to(stop)

    def forget(self, name: str) -> None:
        """The text does not wait any more, nor will it again."""
        self._awaited.pop(name, None)

    def serve(self, name: str, hashes: Hashes, end: int) -> bool:
        """Whether a text should wait, as a leader will leave a memory for it; the leader then stops there.

        Args:
            name: of the text.
            hashes: of the text.
            end: segments that it can take from others.
        """
        if end == 0:
            return False
        # of equal texts one is compared
        stop = self._by_text.get(hashes[end - 1]) or self._find_stop(hashes, end)
        if stop is None:
            return False
        self._by_text[hashes[end - 1]] = self._awaited[name] = stop
        return True

    def _find_stop(self, hashes: Hashes, end: int) -> _Stop | None:
        for begin in self._begins:
            # hashes are chained, so texts are the same up to the last segment with the same one
            leader = self._by_next.get(hashes[begin]) if begin < end else None
            if leader is None:
                continue
            common = _common(leader.hashes, hashes, begin, min(leader.end, end))
            memory = hashes[common - 1]
            stop = self._stops.setdefault((leader.name, memory), _Stop(leader.name, common, memory))
            if self._leads_to(stop):
                return stop
        return None

    def _leads_to(self, stop: _Stop) -> bool:
        """Whether a leader will come to a stop, and has not left the memory there yet: then it stops."""
        leader = self._leaders.get(stop.leader)
        if leader is None:
            return False
        if stop.checked != self._step:
            stop.checked = self._step
            is_on_the_way = leader.begin < stop.end <= leader.end and leader.hashes[stop.end - 1] == stop.memory
            stop.is_ahead = is_on_the_way and not self._find_memory(stop.memory)
            if stop.is_ahead:
                self.stops[stop.leader] = min(stop.end, self.stops.get(stop.leader, stop.end))
        return stop.is_ahead


def _common(one: Hashes, other: Hashes, begin: int, end: int) -> int:
    """How many segments two texts have in common, more than `begin` and at most `end`."""
    return bisect_left(range(end), True, lo=begin, key=lambda i: one[i] != other[i])
