"""The latest memory that the prefix cache has of a text: looked for once, however many steps the text waits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from vllm.v1.core.kv_cache_utils import BlockHash

Page = TypeVar("Page")


class Search(Generic[Page]):
    """The search for the latest memory of one text.

    Only what is published can become the answer later, and only what was found can stop being it. So segments are
    looked up from the last one on until a memory is found, and none of them a second time: those that were found are
    kept for the time when a later one is evicted, and `note` adds what is published meanwhile.

    Args:
        hashes: of the text's segments, each of everything up to its end.
        end: segments that it can take from others.
        look_up: the page with the memory after the segment with this hash, if the prefix cache has it.
    """

    def __init__(self, hashes: Sequence[BlockHash], end: int, look_up: Callable[[BlockHash], Page | None]) -> None:
        self.end = end
        self._hashes = hashes
        self._look_up = look_up
        self._unseen = end
        self._found: list[int] = []

    def latest(self) -> tuple[int, Page] | None:
        """The last segment after which there is a memory, and its page."""
        while self._found or self._unseen:
            if not self._found:
                self._unseen -= 1
                self._found.append(self._unseen)
            if page := self._look_up(self._hashes[self._found[-1]]):
                return self._found[-1], page
            self._found.pop()
        return None

    def note(self, hashes: Sequence[BlockHash], segment: int) -> None:
        """The memory after a segment of another text has been published."""
        if self._unseen <= segment < self.end and self._hashes[segment] == hashes[segment]:
            place = bisect_left(self._found, segment)
            if self._found[place : place + 1] != [segment]:
                self._found.insert(place, segment)


class LatestMemories(Generic[Page]):
    """A search for each text that waits, by the name of its request; `look_up` as for `Search`."""

    def __init__(self, look_up: Callable[[BlockHash], Page | None]) -> None:
        self._look_up = look_up
        self._searches: dict[str, Search[Page]] = {}

    def find(self, name: str, hashes: Sequence[BlockHash], end: int) -> tuple[int, Page] | None:
        """`Search.latest` of the text of a request, which stays what it is until `forget`."""
        search = self._searches.get(name)
        if search is None or search.end != end:
            search = self._searches[name] = Search(hashes, end, self._look_up)
        return search.latest()

    def note(self, hashes: Sequence[BlockHash], segments: Iterable[int]) -> None:
        """Memories of a text have been published: those after `segments`."""
        if self._searches:
            for segment in segments:
                for search in self._searches.values():
                    search.note(hashes, segment)

    def forget(self, name: str) -> None:
        """The request does not wait any more."""
        self._searches.pop(name, None)
