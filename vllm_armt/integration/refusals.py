"""Requests that the scheduler can't serve: they end with finish reason "error" and a sentence as `stop_reason`.

An exception in `add_request` would reach nobody who waits for an answer.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from vllm_armt.memories.args import FIELDS

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


class RefusingScheduler(Scheduler):
    """vLLM's scheduler, which can refuse a request in words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusals: list[tuple[Request, EngineCoreOutput]] = []

    def refuse(self, request: Request, reason: str, params: dict[str, Any] | None = None) -> None:
        """End a request that is none of the scheduler's, or no longer.

        Args:
            request: told with the output of this step, or of the next.
            reason: for who asked.
            params: `kv_transfer_params` of the output.
        """
        logger.error("Request %s was refused. %s", request.request_id, reason)
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=reason,
            events=request.take_events(),
            kv_transfer_params=params,
            trace_headers=request.trace_headers,
        )
        self._refusals.append((request, output))

    def open_memory(self, request: Request) -> bool:
        """Give a request the memory that it asks for; False if it was refused. Here are none."""
        asked = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        if unknown := [field for field in FIELDS if asked.get(field) is not None]:
            self.refuse(
                request,
                f"The request has {', '.join(unknown)}, but this server keeps no memories. Start it with "
                """--additional-config '{"armt": {"memories": "DIR"}}'.""",
            )
        return not unknown

    def has_requests(self) -> bool:
        return bool(self._refusals) or super().has_requests()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step; see vLLM's `Scheduler.update_from_output`."""
        refusals, self._refusals = self._refusals, []
        if self.finished_req_ids_dict is not None:
            for request, _ in refusals:
                self.finished_req_ids_dict[request.client_index].add(request.request_id)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request, output in refusals:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs
