"""Pages that the workers read from disk for requests that wait to be admitted: who waits for which, and how far it is.

A request is admitted once every worker holds its page, read and checked, on the host. What is wrong with a file is so
known before a page of the pool, the prefix cache or another request has to do with it: vLLM's own way, to find it out
in the step, leaves what others have computed from the damaged page in the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from vllm_armt.memories.engine.transfers import Failure, Fetch, Folder, Report, Transfers

HOST_BYTES = 1 << 30
"""Of pages that are held on the host of each worker for requests that wait, beyond one."""


@dataclass
class _Page:
    ticket: int
    place: tuple[Folder, str]
    waiting: set[str] = field(default_factory=set)
    results: list[Failure | None] = field(default_factory=list)


class Fetches:
    """Of one engine.

    Args:
        num_workers: each of which reads every page.
        page_bytes: of a page, all layers.
    """

    def __init__(self, num_workers: int, page_bytes: int) -> None:
        self._num_workers = num_workers
        self._most = max(HOST_BYTES // page_bytes, 1)
        self._tickets = count(1)
        self._by_place: dict[tuple[Folder, str], _Page] = {}
        self._by_ticket: dict[int, _Page] = {}
        self._by_request: dict[str, _Page] = {}
        self._next = Transfers()

    def want(self, request_id: str, folder: Folder, key: str) -> bool | Failure:
        """Whether a request's page is there; if not it comes, or it can't, and why."""
        page = self._by_place.get((folder, key))
        if page is None:
            if len(self._by_place) >= self._most:
                return False
            page = _Page(next(self._tickets), (folder, key))
            self._by_place[page.place] = self._by_ticket[page.ticket] = page
            self._next.fetches.append(Fetch(page.ticket, folder, key))
        page.waiting.add(request_id)
        self._by_request[request_id] = page
        failed = next((result for result in page.results if result is not None), None)
        return failed or len(page.results) == self._num_workers

    def is_reading(self, request_id: str) -> bool:
        """Whether a request waits for a page that is still being read."""
        page = self._by_request.get(request_id)
        return page is not None and len(page.results) < self._num_workers

    def load(self, request_id: str, block: int) -> None:
        """Let the next step copy a request's page, which is there, to a block of the pool."""
        self._next.loads.append((self._by_request[request_id].ticket, block))
        self.release(request_id)

    def release(self, request_id: str) -> None:
        """A request waits no more; a page that nobody waits for is dropped."""
        page = self._by_request.pop(request_id, None)
        if page is None:
            return
        page.waiting.discard(request_id)
        if not page.waiting:
            del self._by_place[page.place], self._by_ticket[page.ticket]
            self._next.drops.append(page.ticket)

    def receive(self, report: Report) -> None:
        """Note what the workers have read."""
        for ticket, results in report.fetched.items():
            if (page := self._by_ticket.get(ticket)) is not None:
                page.results += results

    def fill(self, transfers: Transfers) -> None:
        """Hand over what the next step has to do."""
        upcoming, self._next = self._next, Transfers()
        transfers.fetches, transfers.loads, transfers.drops = upcoming.fetches, upcoming.loads, upcoming.drops
