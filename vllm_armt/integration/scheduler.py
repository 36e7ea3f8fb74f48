"""The scheduler hook: whole segments, shared fairly by the documents, and every decode in every step.

Only this module knows vLLM's scheduler. A document is a request whose prompt (after a preemption: whose
text so far) is still being read; everything else in a step is a decode of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar, Self

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation
from vllm_armt.integration.metrics import Counts, put
from vllm_armt.integration.open_segments import OpenSegments
from vllm_armt.integration.refusals import RefusingScheduler
from vllm_armt.integration.shared_prefix import PrefixLeaders
from vllm_armt.integration.sharing import Shares, Turns, chunk_length


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
        open_pages = pool.num_gpu_blocks - spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes
        self._open_segments = OpenSegments(self._config, open_pages)
        self._pages.segmentation_of = lambda request_id: self._segmentation(self.requests[request_id])
        self._turns = Turns(self.block_size)
        self._shares = Shares(self.block_size, {})
        self._leaders = PrefixLeaders(self._pages.memory_after)
        self._counts = Counts(self.block_size, self._config.base_model_config.num_hidden_layers)
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
        if self.log_stats:
            self._count(output)
        return output

    def _count(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            stats = self.requests[new.req_id].prefill_stats
            if stats is not None and self.kv_cache_manager.prefix_cache_lookup_enabled(self.requests[new.req_id]):
                self._counts.look_up(stats.num_local_cached_tokens)
        S, is_left = self.block_size, self._config.segment_alignment == "left"
        for request_id, n in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            end = request.num_computed_tokens
            # nothing closes, as nearly always; only an open segment may lie otherwise, and it does not close
            if end // S == (end - n) // S and (is_left or end > request.num_prompt_tokens):
                continue
            self._counts.compute(end - n, end, self._segmentation(request), end - n >= prefill_end(request))

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of what was scheduled since the last ones, with our counts."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put(stats, self._take_counts())
        return stats

    def _take_counts(self) -> dict[str, int]:
        self._counts.evict(self._pages.take_num_evicted())
        return self._counts.take()

    def _share_tokens(self) -> None:
        """Decide how many tokens each running document gets, and how many new ones may share."""
        documents = list(self._documents())
        newcomers = self._find_leaders(documents)
        self._shares = self._turns.share(
            self.max_num_scheduled_tokens - (len(self.running) - len(documents)),
            {request.request_id: self._longest_chunk(request) for request in documents},
            {request.request_id: self._longest_chunk(request) for request in newcomers},
        )

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
        self._leaders.begin_step()
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
            # those that wait for a leader may be thousands: cheapest first
            if (
                self._goes_on_waiting(request)
                or self._is_blocked_waiting_status(request.status)
                or not self._is_ready(request)
                or self._follows_leader(request)
            ):
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
        return not self._goes_on_waiting(request) and super()._handle_blocked_waiting_request(request)

    def _goes_on_waiting(self, request: Request) -> bool:
        return self._leaders.waits(request.request_id) and request.num_computed_tokens == 0

    def _follows_leader(self, request: Request) -> bool:
        """Whether a document of this step will leave a memory of a beginning that `request` shares."""
        if request.num_computed_tokens > 0 or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return False
        usable = self._segmentation(request).closed_tokens(request.num_tokens - 1)
        return self._leaders.serve(request.request_id, request.block_hashes, usable // self.block_size)

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """What the prefix cache has of the text of `request`, up to the segment that it keeps open.

        To a longer prompt of someone else that is a closed segment, whose memory a preempted request would
        find once its own text has grown past it. vLLM 0.33 gives a limit of its own, in tokens.
        """
        manager = self.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return manager.empty_kv_cache_blocks, 0, 0, False
        usable = self._segmentation(request).closed_tokens(request.num_tokens - 1)
        if max_cache_hit_length is not None:
            usable = min(usable, max_cache_hit_length)
        blocks, num_tokens = self._pages.latest_memory(request, usable // self.block_size)
        return manager.create_kv_cache_blocks((blocks,)), num_tokens, 0, False

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """How many of `num_new_tokens` are scheduled: vLLM's hook for the length of a chunk.

        0 skips a request in this step. For a waiting one it also ends admission, whatever vLLM does then.
        """
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        if start >= prefill_end(request):
            return 0 if self._awaits_confirmation(request, start) else num_new_tokens
        is_new = request.status != RequestStatus.RUNNING
        room = self._shares.for_newcomer() if is_new else self._shares.granted[request.request_id]
        end = start + min(num_new_tokens, room)
        length = self._chunk_length(request, start, end)
        if is_new:
            self._shares.take(length)
        return length

    def _awaits_confirmation(self, request: Request, token: int) -> bool:
        """Whether decoding `token` waits a step: vLLM may take it back, and what it does to pages could not be undone.

        vLLM takes back the last token of each turn of streamed input. If steps overlap, the next step would decode it
        before that is known. Inside a segment the next turn only overwrites its key; but the last token of a segment
        turns all its keys into a memory, and the first one takes a page that a chunk of the next turn may leave out.
        """
        if not request.resumable or token < request.num_tokens:
            return False
        segmentation = self._segmentation(request)
        return token == segmentation.begin(segmentation.segment(token)) or token + 1 == segmentation.end(token)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Preempt a request; what the step in flight samples for streamed input is sampled again.

        Were it the end of a turn, vLLM would look for the turn's tokens in a request that has none any more.
        """
        super()._preempt_request(request, timestamp, drop_stale_output or request.resumable)

    def _free_request_blocks(self, request: Request) -> None:
        # of a request that ends or is preempted; what it waited for once does not matter any more
        self._leaders.forget(request.request_id)
        super()._free_request_blocks(request)

    def add_request(self, request: Request) -> None:
        """Take a request; one that generates in a segment without end ends with the room for that segment."""
        if not self.open_memory(request):
            return
        request.max_tokens = min(request.max_tokens, self._open_segments.room(request, self._segmentation(request)))
        super().add_request(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if request.resumable and self._config.needs_prompt_length:
            self._open_segments.refuse_streamed_input(request)
            return new_token_ids, True
        if stopped and request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            self._open_segments.explain_end(request, self._segmentation(request))
        return new_token_ids, stopped


class AsyncSegmentScheduler(SegmentScheduler, AsyncScheduler):
    """`SegmentScheduler` for steps that are scheduled while the one before is still running."""


SegmentScheduler.asynchronous = AsyncSegmentScheduler
