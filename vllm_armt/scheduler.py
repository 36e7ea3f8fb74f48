"""The scheduler hook: whole segments, shared fairly by the documents, and every decode in every step.

Only this module knows vLLM's scheduler. A document is a request whose prompt (after a preemption: whose
text so far) is still being read; everything else in a step is a decode of one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv, round_down, round_up
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_armt.cache.spec import PAGES_READ, PAGES_WRITTEN

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


def deal(budget: int, needs: dict[str, int], segment_size: int) -> dict[str, int]:
    """Deal `budget` tokens out to documents, a segment a turn, in the order of `needs`.

    Args:
        budget: tokens that the step has for documents.
        needs: tokens that each document has left to read.
        segment_size: S.

    Returns:
        Tokens for each document: whole segments, or all that it has left.
    """
    dealt = dict.fromkeys(needs, 0)
    turns = deque(needs)
    while turns:
        document = turns.popleft()
        piece = min(segment_size, needs[document] - dealt[document])
        if piece <= budget:
            dealt[document] += piece
            budget -= piece
            if dealt[document] < needs[document]:
                turns.append(document)
    return dealt


def chunk_length(start: int, end: int, text_end: int, segment_size: int) -> int:
    """How many of the tokens `[start, end)` of a text of `text_end` tokens make a legal chunk.

    A chunk ends on a segment's boundary or with the text. One that starts inside a segment stays in it:
    that segment's page is in use already, so it has to be written, and only a chunk's last pages are.
    """
    if start % segment_size:
        end = min(end, round_up(start, segment_size))
    if end < text_end:
        end = round_down(end, segment_size)
    return max(end - start, 0)


def prefill_end(request: Request) -> int:
    """Where `request` turns from a document into decodes; the same as in vLLM's scheduler."""
    return max(request.num_prompt_tokens, request.num_tokens - 1)


class SegmentScheduler(Scheduler):
    """vLLM's scheduler, or its `AsyncScheduler` if the config asks for that, with the rules above.

    Raises:
        ValueError: a step cannot hold a segment and one token of every request.
    """

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(AsyncSegmentScheduler if is_async else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # makes vLLM ask `_mamba_block_aligned_split` how long each chunk may be, and nothing else
        self.need_mamba_block_aligned_split = True
        self._keeps_last_segment_open = self.vllm_config.model_config.hf_config.generation_policy == "open"
        (self._pages,) = self.kv_cache_manager.coordinator.single_type_managers
        self._turns: list[str] = []
        self._dealt: dict[str, int] = {}
        self._admission_budget = 0
        self._num_admissions = 0
        least = self.block_size + self.max_num_running_reqs
        if self.max_num_scheduled_tokens < least:
            raise ValueError(
                f"A step may hold {self.max_num_scheduled_tokens} tokens, but has to fit a segment of "
                f"{self.block_size} and one token of each of {self.max_num_running_reqs} requests. Raise "
                "--max-num-batched-tokens (and --max-num-scheduled-tokens, if you set it) to "
                f"{least} or more, or lower --max-num-seqs."
            )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Put the next step together; see vLLM's `Scheduler.schedule`."""
        self._deal_tokens()
        output = super().schedule(*args, **kwargs)
        self._pages.publish()
        return output

    def _deal_tokens(self) -> None:
        """Decide how many tokens each running document gets, and how many new ones may share.

        Turns go round: a document that is dealt nothing keeps its place, the others go to the back, where
        new documents join. So a document waits for as many others as there are, however long they are.
        """
        running = {
            request.request_id: request.num_tokens - request.num_computed_tokens for request in self._documents()
        }
        admissible = {request.request_id: request.num_tokens for request in self._admissible()}
        needs = running | admissible
        turns = dict.fromkeys(chain((document for document in self._turns if document in needs), needs))
        budget = self.max_num_scheduled_tokens - (len(self.running) - len(running))
        self._dealt = deal(budget, {document: needs[document] for document in turns}, self.block_size)
        self._turns = sorted(turns, key=lambda document: self._dealt[document] > 0)
        self._admission_budget = budget - sum(self._dealt[document] for document in running)
        self._num_admissions = len(admissible)

    def _documents(self) -> Iterator[Request]:
        return (request for request in self.running if request.num_computed_tokens < prefill_end(request))

    def _admissible(self) -> Iterator[Request]:
        """The waiting requests that could start in this step: there are slots and pages for them."""
        slots = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        pages = self._pages.block_pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        for request in chain(self.kv_holding_waiting, self.waiting if self._pause_state == PauseState.UNPAUSED else ()):
            if self._is_blocked_waiting_status(request.status) or self._is_read_by_another(request):
                continue
            slots -= 1
            pages -= min(cdiv(request.num_tokens, self.block_size), PAGES_READ + PAGES_WRITTEN)
            if slots < 0 or pages < 0:
                return
            yield request

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return super()._handle_blocked_waiting_request(request) and not self._is_read_by_another(request)

    def _is_read_by_another(self, request: Request) -> bool:
        """Whether a running document is about to read a segment that `request` can have from it.

        Equal texts that arrive together are then read once: the others skip their turns, and start from
        the memory that the first one leaves in the prefix cache.
        """
        if request.num_computed_tokens > 0 or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return False
        usable = (request.num_tokens - 1) // self.block_size
        for document in self._documents():
            segment = document.num_computed_tokens // self.block_size
            if (
                segment < min(usable, len(document.block_hashes))
                and document.block_hashes[segment] == request.block_hashes[segment]
                and self.kv_cache_manager.prefix_cache_lookup_enabled(document)
            ):
                return True
        return False

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
        room = self._admission_room() if is_new else self._dealt[request.request_id]
        length = chunk_length(start, start + min(num_new_tokens, room), request.num_tokens, self.block_size)
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

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if self._keeps_last_segment_open and not stopped:
            stopped = self._stop_at_full_segment(request)
        return new_token_ids, stopped

    def _stop_at_full_segment(self, request: Request) -> bool:
        """Fail `request` if its next token no longer fits the segment that its prompt ends in.

        With the generation policy "open" the model was trained to generate inside that segment only. The
        client sees finish reason "error" (`LLM()`, which also gives the message as `stop_reason`) or an
        internal server error (HTTP); the message is in the server's log.
        """
        room = round_up(request.num_prompt_tokens, self.block_size) - request.num_prompt_tokens + 1
        if request.num_output_tokens < room:
            return False
        request.stop_reason = (
            f"The prompt has {request.num_prompt_tokens} tokens and this checkpoint generates within the prompt's "
            f"last segment of {self.block_size} (generation_policy 'open'), which is full after {room} new tokens; "
            f"max_tokens is {request.max_tokens}. Lower max_tokens to {room} or use a checkpoint with "
            "generation_policy 'commit'."
        )
        logger.error("Request %s was stopped. %s", request.request_id, request.stop_reason)
        request.status = RequestStatus.FINISHED_ERROR
        request.resumable = False
        return True


class AsyncSegmentScheduler(SegmentScheduler, AsyncScheduler):
    """`SegmentScheduler` for steps that are scheduled while the one before is still running."""
