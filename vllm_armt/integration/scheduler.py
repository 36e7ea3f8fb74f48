"""The scheduler hook: whole segments, shared fairly by the documents, and every decode in every step.

Only this module knows vLLM's scheduler. A document is a request whose prompt (after a preemption: whose
text so far) is still being read; everything else in a step is a decode of one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar, Self

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import round_down, round_up
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation
from vllm_armt.integration.refusals import RefusingScheduler
from vllm_armt.integration.shared_prefix import PrefixLeaders

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


def legal_limits(
    segment_size: int, max_num_seqs: int, max_num_batched_tokens: int, long_prefill_token_threshold: int
) -> tuple[int, int]:
    """The two scheduler limits, raised to the nearest at which every step has room for a segment.

    A step has to fit one token of every decode and a segment besides; a threshold on prefill chunks has
    to be whole segments.

    Returns:
        `max_num_batched_tokens` and `long_prefill_token_threshold` (0 means none and stays 0).
    """
    return (
        max(max_num_batched_tokens, segment_size + max_num_seqs),
        round_up(long_prefill_token_threshold, segment_size),
    )


def round_robin(budget: int, needs: dict[str, int], segment_size: int) -> dict[str, int]:
    """Give `budget` tokens out to documents, a segment a turn, in the order of `needs`.

    Args:
        budget: tokens that the step has for documents.
        needs: tokens that each document has left to read.
        segment_size: S.

    Returns:
        Tokens for each document: whole segments, or all that it has left.
    """
    granted = dict.fromkeys(needs, 0)
    turns = deque(needs)
    while turns:
        document = turns.popleft()
        piece = min(segment_size, needs[document] - granted[document])
        if piece <= budget:
            granted[document] += piece
            budget -= piece
            if granted[document] < needs[document]:
                turns.append(document)
    return granted


def chunk_length(start: int, end: int, text_end: int, segmentation: Segmentation, page_tokens: int) -> int:
    """How many of the tokens `[start, end)` of a text of `text_end` tokens make a legal chunk.

    A chunk ends with the text or with a segment; in one that never closes, with one of its pages of
    `page_tokens` tokens. A chunk that starts inside a segment stays in it: that segment's page is in use
    already, so it has to be written, and only a chunk's last pages are. So does a chunk whose segment is
    shorter than `page_tokens`: the wave takes whole ones only, and the next needs the memory after it.
    """
    beyond = segmentation.end(start)
    if beyond is not None and beyond - start < page_tokens:
        end = min(end, beyond)
    if end < text_end:
        begin = segmentation.begin(segmentation.segment(end))
        end = begin + round_down(end - begin, page_tokens)
    return max(end - start, 0)


def prefill_end(request: Request) -> int:
    """Where `request` turns from a document into decodes; the same as in vLLM's scheduler."""
    return max(request.num_prompt_tokens, request.num_tokens - 1)


class SegmentScheduler(RefusingScheduler):
    """vLLM's scheduler, or its `AsyncScheduler` if the config asks for that, with the rules above.

    Attributes:
        asynchronous: the class for steps that overlap.

    Raises:
        ValueError: a step cannot hold a segment and one token of every request.
    """

    asynchronous: ClassVar[type[SegmentScheduler]]

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(cls.asynchronous if is_async else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # makes vLLM ask `_mamba_block_aligned_split` how long each chunk may be, and nothing else
        self.need_mamba_block_aligned_split = True
        self._config: RecurrentConfig = self.vllm_config.model_config.hf_config
        self._segmentation_of_prompt = lru_cache(maxsize=1 << 12)(self._config.segmentation)
        (self._pages,) = self.kv_cache_manager.coordinator.single_type_managers
        spec, pool = self._pages.kv_cache_spec, self._pages.block_pool
        # without the null block and what a step holds beside the keys of an open segment: it may cross into it
        self._open_pages = pool.num_gpu_blocks - spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes
        self._pages.segmentation_of = lambda request_id: self._segmentation(self.requests[request_id])
        self._round: list[str] = []
        self._granted: dict[str, int] = {}
        self._admission_budget = 0
        self._num_admissions = 0
        self._leaders = PrefixLeaders(self._is_kept)
        self._waiting_for_leader: set[str] = set()
        least = self.block_size + self.max_num_running_reqs
        if self.max_num_scheduled_tokens < least:
            raise ValueError(
                f"A step may hold {self.max_num_scheduled_tokens} tokens, but has to fit a segment of "
                f"{self.block_size} and one token of each of {self.max_num_running_reqs} requests. Raise "
                "--max-num-batched-tokens (and --max-num-scheduled-tokens, if you set it) to "
                f"{least} or more, or lower --max-num-seqs."
            )

    def _segmentation(self, request: Request) -> Segmentation:
        """Where the segments of `request` lie; what it has generated, even before a preemption, does not move them."""
        return self._segmentation_of_prompt(request.num_prompt_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Put the next step together; see vLLM's `Scheduler.schedule`."""
        self._share_tokens()
        output = super().schedule(*args, **kwargs)
        self._pages.publish()
        return output

    def _share_tokens(self) -> None:
        """Decide how many tokens each running document gets, and how many new ones may share.

        Turns go round: a document that is granted nothing keeps its place, the others go to the back, where
        new documents join. So a document waits for as many others as there are, however long they are.
        """
        documents = list(self._documents())
        newcomers = self._find_leaders(documents)
        running = {request.request_id: self._longest_chunk(request) for request in documents}
        admissible = {request.request_id: self._longest_chunk(request) for request in newcomers}
        needs = running | admissible
        turns = dict.fromkeys(chain((document for document in self._round if document in needs), needs))
        budget = self.max_num_scheduled_tokens - (len(self.running) - len(running))
        self._granted = round_robin(budget, {document: needs[document] for document in turns}, self.block_size)
        self._round = sorted(turns, key=lambda document: self._granted[document] > 0)
        self._admission_budget = budget - sum(self._granted[document] for document in running)
        self._num_admissions = len(admissible)

    def _longest_chunk(self, request: Request) -> int:
        start = request.num_computed_tokens
        return self._chunk_length(request, start, request.num_tokens)

    def _chunk_length(self, request: Request, start: int, end: int) -> int:
        stop = self._leaders.stops.get(request.request_id, 0) * self.block_size
        # a new document's chunk may start behind its stop, with what the prefix cache has
        end = min(end, stop) if stop > start else end
        return chunk_length(start, end, request.num_tokens, self._segmentation(request), self.block_size)

    def _documents(self) -> Iterator[Request]:
        return (request for request in self.running if request.num_computed_tokens < prefill_end(request))

    def _find_leaders(self, documents: list[Request]) -> list[Request]:
        """Find which waiting requests could start in this step, and which should wait for another's memory instead."""
        self._leaders = PrefixLeaders(self._is_kept)
        self._waiting_for_leader.clear()
        for document in documents:
            self._add_leader(document)
        newcomers = []
        for request in self._admissible():
            # those behind it in the queue are looked at after this, and may wait for it
            newcomers.append(request)
            self._add_leader(request)
        return newcomers

    def _add_leader(self, request: Request) -> None:
        if self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            closing = self._segmentation(request).closed_tokens(request.num_tokens) // self.block_size
            begin = request.num_computed_tokens // self.block_size
            self._leaders.add(request.request_id, begin, closing, request.block_hashes)

    def _admissible(self) -> Iterator[Request]:
        """The waiting requests that could start in this step: there are slots and pages for them."""
        slots = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        pages = self._pages.block_pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        for request in chain(self.kv_holding_waiting, self.waiting if self._pause_state == PauseState.UNPAUSED else ()):
            if slots <= 0:
                return
            if self._is_blocked_waiting_status(request.status) or not self._is_ready(request):
                continue
            if self._follows_leader(request):
                self._waiting_for_leader.add(request.request_id)
                continue
            slots -= 1
            pages -= self._pages.get_num_blocks_to_allocate(
                request.request_id, request.num_tokens, (), 0, 0, request.num_tokens, apply_admission_cap=True
            )
            if pages < 0:
                return
            yield request

    def _is_ready(self, request: Request) -> bool:
        """Whether what a waiting request needs beside slots and pages is there."""
        return True

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return super()._handle_blocked_waiting_request(request) and request.request_id not in self._waiting_for_leader

    def _follows_leader(self, request: Request) -> bool:
        """Whether a document of this step will leave a memory of a beginning that `request` shares."""
        if request.num_computed_tokens > 0 or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return False
        usable = self._segmentation(request).closed_tokens(request.num_tokens - 1)
        return self._leaders.serve(request.block_hashes, usable // self.block_size)

    def _is_kept(self, block_hash: Any) -> bool:
        return self._pages.block_pool.get_cached_block(block_hash, [self._pages.kv_cache_group_id]) is not None

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """What the prefix cache has of the text of `request`, up to the segment that it keeps open.

        To a longer prompt of someone else that is a closed segment, whose memory a preempted request would
        find once its own text has grown past it.
        """
        hit = super()._get_local_prefix_cache_hit(request)
        usable = self._segmentation(request).closed_tokens(request.num_tokens - 1)
        if hit[1] <= usable:
            return hit
        manager = self.kv_cache_manager
        blocks, num_tokens, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, usable)
        return manager.create_kv_cache_blocks(blocks), num_tokens, 0, False

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """How many of `num_new_tokens` are scheduled: vLLM's hook for the length of a chunk.

        For a running request 0 skips this step; for a waiting one it ends admission in this step.
        """
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        if start >= prefill_end(request):
            return num_new_tokens
        is_new = request.status != RequestStatus.RUNNING
        room = self._admission_room() if is_new else self._granted[request.request_id]
        end = start + min(num_new_tokens, room)
        length = self._chunk_length(request, start, end)
        if is_new:
            self._admission_budget -= length
        return length

    def _admission_room(self) -> int:
        """Tokens for the next new document: an even share, and at least a segment, of what is left for all.

        How much a new document needs shows only here, once the prefix cache has been asked; what it does
        not use goes to the next.
        """
        share = round_down(self._admission_budget // max(self._num_admissions, 1), self.block_size)
        self._num_admissions -= 1
        return min(self._admission_budget, max(share, self.block_size))

    def add_request(self, request: Request) -> None:
        """Take a request; one that generates in a segment without end ends with the room for that segment."""
        if not self.open_memory(request):
            return
        request.max_tokens = min(request.max_tokens, self._room(request))
        super().add_request(request)

    def _room(self, request: Request) -> int:
        """Tokens that `request` can generate before its open segment runs out of positions or pages.

        The last of them needs neither: it is not read any more.
        """
        segmentation = self._segmentation(request)
        if segmentation.last is None:
            return request.max_tokens
        end = segmentation.begin(segmentation.last) + min(self._open_limits(segmentation.last))
        return end - request.num_prompt_tokens + 1

    def _open_limits(self, segment: int) -> tuple[int, int]:
        """Tokens that the base model takes, and that there are pages for, in a segment that never closes."""
        positions = self._config.max_open_tokens - segment * self._config.segment_layout.stride
        return positions, self._open_pages * self.block_size

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if request.resumable and self._config.needs_prompt_length:
            self._refuse_streamed_input(request)
            return new_token_ids, True
        if stopped and request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            self._explain_end(request)
        return new_token_ids, stopped

    def _explain_end(self, request: Request) -> None:
        """Say why a request that ran out of room got fewer tokens than it asked for.

        The client sees finish reason "length" and its tokens, and the sentence as `stop_reason`.
        """
        asked, segment = request.sampling_params, self._segmentation(request).last
        assert asked is not None
        assert asked.max_tokens is not None
        if segment is None or not request.num_output_tokens == request.max_tokens < asked.max_tokens:
            return
        positions, keys = self._open_limits(segment)
        request.stop_reason = (
            f"max_tokens is {asked.max_tokens}, but the prompt of {request.num_prompt_tokens} tokens leaves room for "
            f"{request.max_tokens}: its last segment stays open (generation_policy 'open') and may have "
            + (
                f"{positions} tokens, as many as the base model takes."
                if positions <= keys
                else f"{keys} tokens, whose keys fill the cache. Make it larger (--kv-cache-memory-bytes; "
                "VLLM_CPU_KVCACHE_SPACE on CPUs)."
            )
        )
        logger.warning("Request %s was ended. %s", request.request_id, request.stop_reason)

    def _refuse_streamed_input(self, request: Request) -> None:
        """Fail a request whose prompt may still grow: its segments would have to be cut anew."""
        request.stop_reason = (
            "The request streams its input, but with generation_policy 'open' the whole prompt decides which segment "
            "stays open. Send the prompt in one piece, or use a checkpoint with generation_policy 'commit'."
        )
        logger.error("Request %s was stopped. %s", request.request_id, request.stop_reason)
        request.status = RequestStatus.FINISHED_ERROR
        request.resumable = False


class AsyncSegmentScheduler(SegmentScheduler, AsyncScheduler):
    """`SegmentScheduler` for steps that are scheduled while the one before is still running."""


SegmentScheduler.asynchronous = AsyncSegmentScheduler
