"""The scheduler's half: puts memories in front of prompts, and decides which pages are brought and which are kept.

A request with a memory goes on from `[the last closed segment's ids] + [pending ids] + [its own prompt]`. The page of
column 0 is brought from disk, so the first segment that is read is number 1; that it stands for all the text before is
in `cache_salt`, which vLLM hashes into every block of the request.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_armt.core import Segmentation
from vllm_armt.memories.args import MemoryArgs
from vllm_armt.memories.errors import InvalidInput, MemoriesError
from vllm_armt.memories.fetching import Fetches
from vllm_armt.memories.manifest import Boundary, Manifest
from vllm_armt.memories.metrics import MemoryStats
from vllm_armt.memories.prefix_tier import Prefix, PrefixTier
from vllm_armt.memories.store import Lease, Store
from vllm_armt.memories.transfers import Failure, Report, Save, SavedPrefix, SavedText, Transfers
from vllm_armt.memories.usage import SentTokens

WRITE_BYTES = 1 << 30
"""Of pages on the host that wait to be written; beyond it no request starts that saves, and no prefix is kept."""

FINISHED_WELL = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


@dataclass(eq=False)
class Session:
    """A request, and what memories have to do with it.

    Attributes:
        args: what it asks for; None for an ordinary prompt.
        start: where the text goes on from.
        memory: that it goes on from.
        salt: the client's cache_salt.
        prefix: what the second tier knows of an ordinary prompt, once it does.
        column: where a page is brought to.
        failure: why the request can't go on.
        ticket: of the save, once it was ordered.
        saved: what became of it.
    """

    request: Request
    args: MemoryArgs | None
    start: Boundary
    memory: Manifest | None = None
    lease: Lease | None = None
    salt: str | None = None
    prefix: Future[Prefix] | None = None
    column: int = 0
    failure: Failure | None = None
    ticket: int | None = None
    saved: dict[str, Any] | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save was ordered that is not reported yet."""
        return self.ticket is not None and self.saved is None

    @property
    def saves_answer(self) -> bool:
        return self.args is not None and self.args.save_memory is not None and self.args.save_memory.after == "answer"

    @property
    def saves_prompt(self) -> bool:
        return self.args is not None and self.args.saves and not self.saves_answer

    def info(self) -> dict[str, Any]:
        """What the response says of memories."""
        used = self.memory
        info: dict[str, Any] = {}
        if used is not None:
            info["used"] = {"id": used.id, "name": used.name, "tokens": used.tokens, "segments": used.segments}
        if self.saved is not None:
            info["saved"] = self.saved
        return {"memory": info}


@dataclass
class Admission:
    """Of one engine.

    Attributes:
        store: the memories.
        segmentation_of: where the segments of a prompt of so many tokens lie.
        segment_size: S.
        max_model_len: tokens that a request may have.
        page_bytes: of a page, all layers.
        num_workers: of the engine.
        block_ids: the block table of the request with this id.
        tier: the second tier of the prefix cache; None if there is none.
    """

    store: Store
    segmentation_of: Callable[[int], Segmentation]
    segment_size: int
    max_model_len: int
    page_bytes: int
    num_workers: int
    block_ids: Callable[[str], Sequence[int]]
    tier: PrefixTier | None
    sessions: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fetches = Fetches(self.num_workers, self.page_bytes)
        # clients choose their salts, so what stands for a memory is nothing that they can know
        self._secret = secrets.token_hex(16)
        self._tickets = count(1)
        self._unread: dict[str, Session] = {}
        self._writing: dict[int, Session] = {}
        self._of_ended: list[Save] = []
        self._failed: list[Session] = []
        self._saved: list[Session] = []
        self._counts: Counter[str] = Counter()

    # a request comes ------------------------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """Put the memory that a new request names in front of its prompt, and note what it saves.

        Raises:
            MemoriesError: it can't be; nothing was changed.
        """
        try:
            self._open(request)
        except MemoriesError:
            self._counts["refusals"] += 1
            raise

    def _open(self, request: Request) -> None:
        args = MemoryArgs.of(request.sampling_params)
        if args is None:
            return
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
            raise InvalidInput("Memories are of text: a prompt of embeddings or with other inputs can't be used.")
        if request.resumable:
            raise InvalidInput("A request that streams its input can't use or save a memory. Send it in one piece.")
        salt, lease = request.cache_salt, None
        if args.reference is not None:
            lease = self.store.use(args.reference, salt=salt, unfinished=args.build_memory is not None)
        try:
            session = self._begin(request, args, lease, salt)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self.sessions[request.request_id] = session
        if session.saves_prompt:
            self._unread[request.request_id] = session

    def _begin(self, request: Request, args: MemoryArgs, lease: Lease | None, salt: str | None) -> Session:
        memory = None if lease is None else lease.memory
        start = Boundary.start(salt) if memory is None else memory.boundary
        assert request.prompt_token_ids is not None
        own = request.prompt_token_ids[args.memory_skip :]
        if not own:
            raise InvalidInput("Nothing is left of the prompt behind the memory: give at least one token.")
        if len(start.last) not in (0, self.segment_size):
            raise InvalidInput("The memory was not made with this model's segment_size.")
        before = [*start.last, *start.pending]
        if len(before) + len(own) >= self.max_model_len:
            raise InvalidInput(
                f"The prompt has {len(own)} tokens and stands behind {len(before)} of the end of the memory: together "
                f"{len(before) + len(own)}, but fewer than max_model_len ({self.max_model_len}) are allowed. Shorten "
                "it, or append it to the memory in pieces."
            )
        if args.save_memory is not None:
            args.save_memory.check(self.store, memory, salt)
        if before or args.memory_skip:
            # an engine in the process of its client shares the list with it
            request.prompt_token_ids = before + own
            request._all_token_ids[: args.memory_skip] = before
            request.num_prompt_tokens = len(request.prompt_token_ids)
            if start.segments:
                request.cache_salt = f"{self._secret} {start.page}"
            # placeholders must not be read as if they were the text
            request.skip_reading_prefix_cache = False
            request.block_hashes.clear()
            request.update_block_hashes()
            request.prefill_stats = SentTokens(len(before) - args.memory_skip)
        return Session(request, args, start, memory, lease, salt)

    def look_up(self, request: Request) -> None:
        """Ask the second tier about an ordinary prompt."""
        ids = request.prompt_token_ids
        if self.tier is None or request.request_id in self.sessions or ids is None or request.resumable:
            return
        session = Session(request, None, Boundary(), salt=request.cache_salt)
        if request.skip_reading_prefix_cache or len(ids) < self.segment_size:
            return
        session.prefix = self.tier.look_up(ids, session.salt, self.segmentation_of(len(ids)))
        self.sessions[request.request_id] = self._unread[request.request_id] = session

    # it waits to be admitted ----------------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """How many tokens beyond those that the prefix cache has a page brings; None: ask again in the next step."""
        session = self.sessions.get(request.request_id)
        if session is None:
            return 0
        if session.failure is not None or (self._is_full and session.args is not None and session.args.saves):
            return None
        if session.args is None:
            return self._prefix_tokens(session, computed)
        if session.start.page is None or computed >= self.segment_size:
            return 0
        there = self.fetches.want(request.request_id, "pages", session.start.page)
        if isinstance(there, Failure):
            assert session.memory is not None
            name = session.memory.name or session.memory.id
            session.failure = Failure(f"The memory {name!r} can't be used. {there.message}", there.status)
            self._failed.append(session)
            self._counts["load_failures"] += 1
            return None
        session.column = 0
        return self.segment_size if there else None

    def _prefix_tokens(self, session: Session, computed: int) -> int | None:
        assert session.prefix is not None
        if not session.prefix.done():
            return None
        prefix = session.prefix.result()
        tokens = prefix.segments * self.segment_size
        if tokens <= computed:
            return 0
        there = self.fetches.want(session.request.request_id, prefix.folder, prefix.key)
        if there is False:
            return None
        # what can't be had is computed as if it had never been kept
        session.column = prefix.segments - 1
        return 0 if isinstance(there, Failure) else tokens - computed

    @property
    def _is_full(self) -> bool:
        return len(self._writing) * self.page_bytes >= WRITE_BYTES

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
        if session.memory is not None:
            self._counts["loads" if num_brought else "pool_hits"] += 1
            if not session.request.num_preemptions:
                self._counts["uses"] += 1
                self._counts["tokens_not_read"] += session.start.segments * self.segment_size
        elif num_brought:
            self._counts["prefix_loads"] += 1

    # its text is read -----------------------------------------------------------------------------------------------

    def fill(self, output: SchedulerOutput) -> Transfers:
        """What the workers have to do in a step."""
        transfers = Transfers(is_idle=not output.total_num_scheduled_tokens)
        self.fetches.fill(transfers)
        transfers.saves_before, self._of_ended = self._of_ended, []
        for request_id in self._unread.keys() & output.num_scheduled_tokens.keys():
            request = self._unread[request_id].request
            if request.num_computed_tokens + output.num_scheduled_tokens[request_id] >= request.num_prompt_tokens:
                transfers.saves_after += self._save_prompt(self._unread.pop(request_id))
        return transfers

    def _save_prompt(self, session: Session) -> list[Save]:
        """The pages that are kept of a prompt; the step that is being put together reads its end."""
        request = session.request
        blocks = self.block_ids(request.request_id)
        if session.args is not None:
            assert request.prompt_token_ids is not None
            return [self._save_text(session, request.prompt_token_ids, request.num_prompt_tokens, blocks)]
        assert session.prefix is not None
        if not session.prefix.done() or self._is_full:
            return []
        lacking = session.prefix.result().lacking
        return [
            self._save(session, blocks[segment - 1], SavedPrefix(key))
            for segment, key in lacking.items()
            if blocks[segment - 1] != 0
        ]

    def _save_text(self, session: Session, ids: Sequence[int], computed: int, blocks: Sequence[int]) -> Save:
        """The save of a text of which so many tokens are computed."""
        args = session.args
        assert args is not None
        options = None
        if args.save_memory is not None:
            options = {"parent": session.memory, "salt": session.salt} | args.save_memory.options
        segmentation = self.segmentation_of(session.request.num_prompt_tokens)
        text = SavedText(session.start, np.array(ids, dtype=np.int32), segmentation.closed_tokens(computed), options)
        block = blocks[text.closed // self.segment_size - 1] if text.has_page else None
        assert block != 0, "the page after the last closed segment is retained"
        save = self._save(session, block, text)
        session.ticket = save.ticket
        return save

    def _save(self, session: Session, block: int | None, what: SavedPrefix | SavedText) -> Save:
        save = Save(next(self._tickets), block, what)
        self._writing[save.ticket] = session
        return save

    # it ends --------------------------------------------------------------------------------------------------------

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request has ended, and its pages are about to be freed; what its response says of memories."""
        session = self.sessions.get(request.request_id)
        if session is None:
            return None
        self.fetches.release(request.request_id)
        self._unread.pop(request.request_id, None)
        if session.saves_answer and request.status in FINISHED_WELL:
            self._of_ended.append(self._save_answer(session))
        if not session.is_saving:
            self._close(session)
        return session.info() if session.args is not None else None

    def _save_answer(self, session: Session) -> Save:
        """The save of all that a request has read and written. Its last token is not computed."""
        request, args = session.request, session.args
        assert args is not None
        assert args.save_memory is not None
        computed, end = request.num_tokens - 1, request.num_tokens
        is_stopped = request.status == RequestStatus.FINISHED_STOPPED
        if is_stopped and not args.save_memory.include_stop_token:
            end -= 1
        return self._save_text(session, request._all_token_ids[:end], computed, self.block_ids(request.request_id))

    def _close(self, session: Session) -> None:
        self.sessions.pop(session.request.request_id, None)
        if session.lease is not None:
            session.lease.release()

    # the workers report ---------------------------------------------------------------------------------------------

    def receive(self, report: Report) -> None:
        """Note what the workers have read and written."""
        self.fetches.receive(report)
        for ticket, result in report.saved.items():
            session = self._writing.pop(ticket)
            if session.args is None:
                self._counts["prefix_saves"] += not isinstance(result, Failure)
                continue
            self._counts["save_failures" if isinstance(result, Failure) else "saves"] += 1
            session.saved = _described(result)
            if session.request.is_finished():
                self._close(session)
                self._saved.append(session)

    @property
    def has_work(self) -> bool:
        """Whether steps are needed although no request is left to be computed."""
        return bool(self._of_ended) or any(session.args is not None for session in self._writing.values())

    def is_saving(self, request_id: str) -> bool:
        """Whether a request has a save that is not reported yet."""
        session = self.sessions.get(request_id)
        return session is not None and session.is_saving

    def take_failed(self) -> list[Session]:
        """Sessions whose requests can't go on."""
        failed, self._failed = self._failed, []
        return failed

    def take_saved(self) -> list[Session]:
        """Sessions of ended requests whose save has been reported."""
        saved, self._saved = self._saved, []
        return saved

    def take_stats(self) -> MemoryStats:
        """What was counted since the last time."""
        counts, self._counts = self._counts, Counter()
        return MemoryStats({name: count for name, count in counts.items() if count})

    def shutdown(self) -> None:
        if self.tier is not None:
            self.tier.shutdown()
        for session in self.sessions.values():
            if session.lease is not None:
                session.lease.release()


def _described(result: Manifest | Boundary | Failure | None) -> dict[str, Any]:
    """A save's outcome, for the response."""
    if isinstance(result, Manifest):
        fields = ("id", "name", "parent", "tokens", "segments", "bytes")
        return {field: getattr(result, field) for field in fields}
    if isinstance(result, Boundary):
        return {"boundary": result.model_dump_json()}
    assert result is not None
    return {"error": result.message, "status": result.status}
