"""A worker's pages on their way from disk to pool and back. The disk is left to threads; a step only copies.

A page is read and checked before the request that waits for it is admitted, so nothing can fail in the step that takes
it over; and one that is saved is copied to the host in a step and written by a thread, which then makes it a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_armt.memories.disk.manifest import Boundary, Manifest
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.engine.page_tensors import PageTensors
from vllm_armt.memories.engine.transfers import Failure, Fetch, Report, Save, SavedPrefix, SavedText, Transfers
from vllm_armt.memories.errors import MemoriesError

logger = init_logger(f"vllm.{__name__}")

READERS, WRITERS = 2, 4
"""Threads: hashing keeps a core busy, writing waits for the disk."""
IDLE_SECONDS = 0.002
"""How long a step that computes nothing waits for a thread."""
KEPT_BYTES = 256 << 20
"""Of pages that pieces of long texts have left, beyond one; the next piece takes its own over without the disk."""


class PageIO:
    """Does what `Transfers` say, and reports it.

    Args:
        store: what is read and written.
        tensors: of the worker's pool.
        segment_size: S.
        is_writer: whether this worker writes; of those that share a model only the first does.
    """

    def __init__(self, store: Store, tensors: PageTensors, segment_size: int, is_writer: bool) -> None:
        self._store, self._tensors, self._is_writer = store, tensors, is_writer
        self._segment_size = segment_size
        self._readers = ThreadPoolExecutor(READERS, "memories-read")
        self._writers = ThreadPoolExecutor(WRITERS, "memories-write")
        self._done: SimpleQueue[Callable[[Report], None]] = SimpleQueue()
        self._pages: dict[int, Mapping[str, Tensor] | None] = {}
        self._kept: dict[str, Mapping[str, Tensor]] = {}
        self._num_writing = 0

    def step_starts(self, transfers: Transfers) -> None:
        """Copy out what the step may overwrite; begin to read."""
        for save in transfers.saves_before:
            self._save(save)
        for fetch in transfers.fetches:
            self._pages[fetch.ticket] = None
            kept = self._kept.pop(fetch.key, None) if fetch.folder == "pages" else None
            if kept is not None:
                self._done.put(self._fetched(fetch, kept))
            else:
                self._readers.submit(self._finish, self._read, fetch)

    def load(self, transfers: Transfers) -> None:
        """Copy fetched pages into the pool, before the forward that reads them."""
        for ticket, block in transfers.loads:
            page = self._pages[ticket]
            assert page is not None, "a request is admitted once all workers have its page"
            self._tensors.copy_in(block, page)

    def step_ends(self, transfers: Transfers) -> None:
        """Copy out what the step has written."""
        for save in transfers.saves_after:
            self._save(save)
        for ticket in transfers.drops:
            self._pages.pop(ticket, None)

    def report(self, transfers: Transfers) -> Report | None:
        """What the threads have done since the last report."""
        report = Report()
        is_waiting = transfers.is_idle and (self._num_writing or None in self._pages.values())
        try:
            self._done.get(timeout=IDLE_SECONDS if is_waiting else 0)(report)
            while True:
                self._done.get_nowait()(report)
        except Empty:
            return report if report.fetched or report.saved else None

    def shutdown(self) -> None:
        """Write what is still to be written."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown()

    def _finish(self, work: Callable[[Any], Callable[[Report], None]], task: Fetch | Save) -> None:
        self._done.put(work(task))

    # reading --------------------------------------------------------------------------------------------------------

    def _read(self, fetch: Fetch) -> Callable[[Report], None]:
        folder = self._store.pages if fetch.folder == "pages" else self._store.prefix
        page: Mapping[str, Tensor] | Failure
        try:
            page = folder.load(fetch.key, self._tensors.spec)
            if self._tensors.is_cuda:
                page = {name: tensor.pin_memory() for name, tensor in page.items()}
        except Exception as error:
            page = _failure(error, f"reading the page {fetch.key}")
        return self._fetched(fetch, page)

    def _fetched(self, fetch: Fetch, page: Mapping[str, Tensor] | Failure) -> Callable[[Report], None]:
        def note(report: Report) -> None:
            # nobody may wait for it any more
            if fetch.ticket in self._pages:
                failed = isinstance(page, Failure)
                self._pages[fetch.ticket] = {} if failed else page  # type: ignore[assignment]
                report.fetched[fetch.ticket] = [page if failed else None]  # type: ignore[list-item]

        return note

    # writing --------------------------------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        # all workers take part, also those that get nothing of it
        page = self._tensors.copy_out(save.block) if save.block is not None else {}
        if not self._is_writer:
            return
        copied = None
        if self._tensors.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._num_writing += 1
        self._writers.submit(self._finish, lambda save: self._write(save, page, copied), save)

    def _write(
        self, save: Save, page: Mapping[str, Tensor], copied: torch.cuda.Event | None
    ) -> Callable[[Report], None]:
        result: Manifest | Boundary | Failure | None
        try:
            if copied is not None:
                copied.synchronize()
            if isinstance(save.what, SavedPrefix):
                self._store.prefix.save(save.what.key, page)
                result = None
            else:
                result = self._write_memory(save.what, page)
        except Exception as error:
            result = _failure(error, "saving a memory")

        def note(report: Report) -> None:
            self._num_writing -= 1
            report.saved[save.ticket] = result
            # of a text that is still being read; a memory that is complete may never be asked
            if isinstance(result, Boundary) and not isinstance(result, Manifest) and result.page is not None and page:
                self._keep(result.page, page)

        return note

    def _keep(self, key: str, page: Mapping[str, Tensor]) -> None:
        self._kept[key] = page
        while len(self._kept) > max(KEPT_BYTES // self._tensors.bytes, 1):
            del self._kept[next(iter(self._kept))]

    def _write_memory(self, text: SavedText, page: Mapping[str, Tensor]) -> Manifest | Boundary:
        boundary = text.start.read(text.ids.tolist(), text.closed, self._segment_size)
        if text.has_page:
            assert boundary.page is not None
            self._store.pages.save(boundary.page, page)
        return boundary if text.options is None else self._store.create(boundary, **text.options)


def _failure(error: Exception, doing: str) -> Failure:
    """An error in words; of one that is ours to mend the log says all."""
    if isinstance(error, MemoriesError):
        logger.warning("Failed at %s. %s", doing, error)
        return Failure(str(error), error.status)
    logger.exception("Failed at %s.", doing)
    return Failure(f"The server failed at {doing} ({type(error).__name__}); its log says more.", 500)
