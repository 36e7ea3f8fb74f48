"""What scheduler and workers tell each other, once a step, about pages that are read from disk and written to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vllm_armt.memories.disk.manifest import Boundary, Manifest

Folder = Literal["pages", "prefix"]
"""Of a store: the pages of memories, or those of ordinary prompts."""


@dataclass(frozen=True)
class Fetch:
    """A page to be read from disk and checked, into the memory of the host."""

    ticket: int
    folder: Folder
    key: str


@dataclass(frozen=True)
class SavedPrefix:
    """A page of an ordinary prompt; its key."""

    key: str


@dataclass(frozen=True)
class SavedText:
    """A text that becomes a memory.

    Attributes:
        start: where it went on from.
        ids: int32; `start.last`, `start.pending` and what came behind them.
        closed: how many of them are in closed segments.
        options: of `Store.create`; None where the memory is in progress and only its page is written.
    """

    start: Boundary
    ids: np.ndarray
    closed: int
    options: dict[str, Any] | None

    @property
    def has_page(self) -> bool:
        """Whether a segment was closed that the memory before has not."""
        return self.closed > len(self.start.last)


@dataclass(frozen=True)
class Save:
    """Something to be written; `block` is the page in vLLM's pool, None where there is no new one."""

    ticket: int
    block: int | None
    what: SavedPrefix | SavedText


@dataclass
class Transfers(KVConnectorMetadata):
    """What a step has to do.

    Attributes:
        fetches: pages to begin reading.
        loads: tickets of fetched pages, with the block of the pool that each is copied to before the step's forward.
        drops: tickets of fetched pages that nobody waits for any more, after this step.
        saves_before: of pages that nobody may have written since the step before.
        saves_after: of pages that this step writes.
        is_idle: the step computes nothing, so that a worker may wait a moment for its threads.
    """

    fetches: list[Fetch] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    saves_before: list[Save] = field(default_factory=list)
    saves_after: list[Save] = field(default_factory=list)
    is_idle: bool = False


@dataclass(frozen=True)
class Failure:
    """Why something could not be done, for the person who asked; `status` is HTTP's."""

    message: str
    status: int


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What a worker's threads have done since the step before, or all workers' in one.

    Attributes:
        fetched: by ticket, of each worker that has the page now None, and of each that can't have it why.
        saved: by ticket, the new memory, the boundary of one that is in progress, None for a prefix, or why not.
    """

    fetched: dict[int, list[Failure | None]] = field(default_factory=dict)
    saved: dict[int, Manifest | Boundary | Failure | None] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """This worker's report and another's."""
        assert isinstance(other, Report)
        tickets = self.fetched.keys() | other.fetched.keys()
        fetched = {ticket: self.fetched.get(ticket, []) + other.fetched.get(ticket, []) for ticket in tickets}
        return Report(fetched, self.saved | other.saved)
