"""The scheduler of servers that keep memories: what vLLM's connectors have no hook for.

A request's last output waits for its memory, so that who has the answer has the memory.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_armt.integration.scheduler import AsyncSegmentScheduler, SegmentScheduler
from vllm_armt.memories.engine.admission import Admission
from vllm_armt.memories.engine.connector import MemoryConnector
from vllm_armt.memories.engine.transfers import Report
from vllm_armt.memories.errors import MemoriesError


class MemoryScheduler(SegmentScheduler):
    """`SegmentScheduler` with a `MemoryConnector`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, tuple[int, EngineCoreOutput]] = {}

    @property
    def _memories(self) -> Admission:
        assert isinstance(self.connector, MemoryConnector)
        return self.connector.admission

    def open_memory(self, request: Request) -> bool:
        """Give a request the memory that it asks for; False if it was refused."""
        try:
            self._memories.open(request)
        except MemoriesError as error:
            self.refuse(request, str(error), _error(str(error), error.status))
            return False
        return True

    def _is_ready(self, request: Request) -> bool:
        return not self._memories.is_reading(request.request_id)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Preempt; the end of a request that saves its answer must not come from a step whose pages are given away."""
        session = self._memories.sessions.get(request.request_id)
        saves = session is not None and session.saves_answer
        super()._preempt_request(request, timestamp, drop_stale_output or saves)

    def _take_counts(self) -> dict[str, int]:
        return super()._take_counts() | self._memories.take_counts()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step; see vLLM's `Scheduler.update_from_output`."""
        memories, transferred = self._memories, model_runner_output.kv_connector_output
        if transferred is not None and transferred.kv_connector_worker_meta is not None:
            report = transferred.kv_connector_worker_meta
            assert isinstance(report, Report)
            memories.receive(report)
        for session in memories.take_failed():
            failure = session.failure
            assert failure is not None
            for request in self.finish_requests(session.request.request_id, RequestStatus.FINISHED_ERROR):
                self.refuse(request, failure.message, _error(failure.message, failure.status))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, of_client in outputs.items():
            held = [output for output in of_client.outputs if output.finished and memories.is_saving(output.request_id)]
            if held:
                self._held |= {output.request_id: (client, output) for output in held}
                of_client.outputs = [output for output in of_client.outputs if output.request_id not in self._held]
        for session in memories.take_saved():
            # of a request that was aborted meanwhile nothing is held
            client, output = self._held.pop(session.request.request_id, (0, None))
            if output is not None:
                output.kv_transfer_params = session.info()
                outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs


class AsyncMemoryScheduler(MemoryScheduler, AsyncSegmentScheduler):
    """`MemoryScheduler` for steps that are scheduled while the one before is still running."""


MemoryScheduler.asynchronous = AsyncMemoryScheduler


def _error(message: str, status: int) -> dict[str, Any]:
    return {"memory": {"error": message, "status": status}}
