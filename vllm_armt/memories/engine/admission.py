"""The scheduler's half: from a request's arrival over the page that is brought for it to what is kept of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_armt.core import Segmentation
from vllm_armt.memories.disk.manifest import Boundary
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.engine.fetching import Fetches
from vllm_armt.memories.engine.opening import Opening
from vllm_armt.memories.engine.prefix_tier import PrefixTier
from vllm_armt.memories.engine.saving import Saves
from vllm_armt.memories.engine.session import Session
from vllm_armt.memories.engine.transfers import Failure, Report, Transfers
from vllm_armt.memories.errors import MemoriesError

FINISHED_WELL = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


class Admission:
    """Of one engine.

    Args:
        store: the memories.
        segmentation_of: where the segments of a prompt of so many tokens lie.
        segment_size: S.
        max_model_len: tokens that a request may have.
        page_bytes: of a page, all layers.
        num_workers: of the engine.
        block_ids: the block table of the request with this id.
        tier: the second tier of the prefix cache; None if there is none.

    Attributes:
        sessions: by the id of their requests, which the scheduler has or whose saves are not reported.
    """

    def __init__(
        self,
        store: Store,
        segmentation_of: Callable[[int], Segmentation],
        segment_size: int,
        max_model_len: int,
        page_bytes: int,
        num_workers: int,
        block_ids: Callable[[str], Sequence[int]],
        tier: PrefixTier | None,
    ) -> None:
        self.store = store
        self.sessions: dict[str, Session] = {}
        self.opening = Opening(store, segment_size, max_model_len)
        self.fetches = Fetches(num_workers, page_bytes)
        self.saves = Saves(segmentation_of, segment_size, page_bytes, block_ids)
        self._segmentation_of, self._segment_size, self._tier = segmentation_of, segment_size, tier
        self._failed: list[Session] = []
        self._saved: list[Session] = []
        self._counts: Counter[str] = Counter()

    def open(self, request: Request) -> None:
        """Give a new request the memory that it asks for, and note what it saves.

        Raises:
            MemoriesError: it can't be; nothing was changed.
        """
        try:
            session = self.opening.open(request)
        except MemoriesError:
            self._counts["memory_refusals"] += 1
            raise
        if session is not None:
            self.sessions[request.request_id] = session
            if session.saves_prompt:
                self.saves.expect(session)

    def look_up(self, request: Request) -> None:
        """Ask the second tier about a new request that asks for no memory."""
        ids = request.prompt_token_ids
        if self._tier is None or request.request_id in self.sessions or ids is None or request.resumable:
            return
        if len(ids) >= self._segment_size and not request.skip_reading_prefix_cache:
            prefix = self._tier.look_up(ids, request.cache_salt, self._segmentation_of(len(ids)))
            session = Session(request, None, Boundary(), prefix=prefix)
            self.sessions[request.request_id] = session
            self.saves.expect(session)

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """How many tokens beyond those that the prefix cache has a page brings; None: ask again in the next step."""
        session = self.sessions.get(request.request_id)
        if session is None:
            return 0
        if session.args is None:
            return self._prefix_tokens(session, computed)
        if session.failure is not None or (session.args.saves and self.saves.are_too_many):
            return None
        if session.start.page is None or computed >= self._segment_size:
            return 0
        there = self.fetches.want(request.request_id, "pages", session.start.page)
        if isinstance(there, Failure):
            assert session.memory is not None
            name = session.memory.name or session.memory.id
            session.failure = Failure(f"The memory {name!r} can't be used. {there.message}", there.status)
            self._failed.append(session)
            self._counts["memory_load_failures"] += 1
            return None
        session.column = 0
        return self._segment_size if there else None

    def _prefix_tokens(self, session: Session, computed: int) -> int | None:
        assert session.prefix is not None
        if not session.prefix.done():
            return None
        prefix = session.prefix.result()
        tokens = prefix.segments * self._segment_size
        if tokens <= computed:
            return 0
        there = self.fetches.want(session.request.request_id, prefix.folder, prefix.key)
        if there is False:
            return None
        session.column = prefix.segments - 1
        # what can't be had is computed as if it had never been kept
        return 0 if isinstance(there, Failure) else tokens - computed

    def is_reading(self, request_id: str) -> bool:
        """Whether a request can't be admitted yet, as its page is being read."""
        return self.fetches.is_reading(request_id)

    def admitted(self, request_id: str, blocks: Sequence[int], num_brought: int) -> None:
        """A request has got its pages, of which one is brought if `num_brought` tokens are."""
        session = self.sessions.get(request_id)
        if session is None:
            return
        if num_brought:
            self.fetches.load(request_id, blocks[session.column])
        else:
            self.fetches.release(request_id)
        if session.memory is None:
            self._counts["memory_prefix_loads"] += bool(num_brought)
            return
        self._counts["memory_loads" if num_brought else "memory_pool_hits"] += 1
        if not session.request.num_preemptions:
            self._counts["memory_uses"] += 1
            self._counts["memory_tokens_not_read"] += session.start.segments * self._segment_size

    def fill(self, output: SchedulerOutput) -> Transfers:
        """What the workers have to do in a step."""
        transfers = Transfers(is_idle=not output.total_num_scheduled_tokens)
        self.fetches.fill(transfers)
        self.saves.fill(transfers, output)
        return transfers

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request has ended, and its pages are about to be freed; what its response says of memories."""
        session = self.sessions.get(request.request_id)
        if session is None:
            return None
        self.fetches.release(request.request_id)
        self.saves.forget(session)
        if session.saves_answer and request.status in FINISHED_WELL:
            self.saves.save_answer(session)
        if not session.is_saving:
            self._close(session)
        return session.info() if session.args is not None else None

    def receive(self, report: Report) -> None:
        """Note what the workers have read and written."""
        self.fetches.receive(report)
        for session, result in self.saves.receive(report):
            failed = isinstance(result, Failure)
            if session.args is None:
                self._counts["memory_prefix_saves"] += not failed
                continue
            self._counts["memory_save_failures" if failed else "memory_saves"] += 1
            session.saved = result
            if session.request.is_finished():
                self._close(session)
                self._saved.append(session)

    def _close(self, session: Session) -> None:
        del self.sessions[session.request.request_id]
        self.opening.close(session)

    def is_saving(self, request_id: str) -> bool:
        """Whether a request has a save that is not reported yet."""
        session = self.sessions.get(request_id)
        return session is not None and session.is_saving

    def take_failed(self) -> list[Session]:
        """Sessions whose requests can't go on."""
        failed, self._failed = self._failed, []
        return failed

    def take_saved(self) -> list[Session]:
        """Sessions of ended requests whose saves have been reported."""
        saved, self._saved = self._saved, []
        return saved

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last time, by the names of `metrics.COUNTERS`; what is 0 is left out."""
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}

    def shutdown(self) -> None:
        """Let go of threads and files."""
        if self._tier is not None:
            self._tier.shutdown()
        self.opening.shutdown()
