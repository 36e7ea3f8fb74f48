"""Requests that generate in a segment which never closes: how much, and what they are told when they are ended.

Positions and pages of such a segment run out; where it begins depends on the whole prompt.
"""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus

from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


class OpenSegments:
    """The open segments of requests.

    Args:
        config: of the model.
        pages: that one of them may have.
    """

    def __init__(self, config: RecurrentConfig, pages: int) -> None:
        self._config = config
        self._pages = pages

    def room(self, request: Request, segmentation: Segmentation) -> int:
        """Tokens that `request` can generate before its open segment runs out of positions or pages.

        The last of them needs neither: it is not read any more.
        """
        if segmentation.last is None:
            return request.max_tokens
        end = segmentation.begin(segmentation.last) + min(self._limits(segmentation.last))
        return end - request.num_prompt_tokens + 1

    def _limits(self, segment: int) -> tuple[int, int]:
        """Tokens that the base model takes, and that there are pages for, in a segment that never closes."""
        positions = self._config.max_open_tokens - segment * self._config.segment_layout.stride
        return positions, self._pages * self._config.segment_size

    def explain_end(self, request: Request, segmentation: Segmentation) -> None:
        """Say why a request that ran out of room got fewer tokens than it asked for.

        The client sees finish reason "length" and its tokens, and the sentence as `stop_reason`.
        """
        asked, segment = request.sampling_params, segmentation.last
        assert asked is not None
        assert asked.max_tokens is not None
        if segment is None or not request.num_output_tokens == request.max_tokens < asked.max_tokens:
            return
        positions, keys = self._limits(segment)
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

    def refuse_streamed_input(self, request: Request) -> None:
        """Fail a request whose prompt may still grow: its segments would have to be cut anew."""
        request.stop_reason = (
            "The request streams its input, but with generation_policy 'open' the whole prompt decides which segment "
            "stays open. Send the prompt in one piece, or use a checkpoint with generation_policy 'commit'."
        )
        logger.error("Request %s was stopped. %s", request.request_id, request.stop_reason)
        request.status = RequestStatus.FINISHED_ERROR
        request.resumable = False
