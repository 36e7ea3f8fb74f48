"""The CPU worker: vLLM's, except that it says which outputs a step needs, and that seeds survive long prompts.

Most steps need the output of each chunk's last token alone; the planner is told which need all.

Why it samples by itself: after a step that ends inside a prompt, vLLM takes the draw of the discarded token back
    with `set_offset`, which generators on CPUs do not have; a request with a `seed` and a prompt of several steps
    ends the engine.
Applies to: vLLM 0.31 to 0.33, V1 runner.
Upstream: vllm/v1/worker/gpu_model_runner.py, `_bookkeeping_sync`.
Test: tests/integration/test_worker.py fails once vLLM's own worker does without this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_armt.integration.builder import needs_all_outputs


class RecurrentCPUWorker(CPUWorker):
    """vLLM's CPU worker; tells the planner of outputs, and lets requests draw only for tokens that count."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run a step; see vLLM's `Worker.execute_model`."""
        runner = self.model_runner
        if isinstance(runner, CPUModelRunner):
            # until their prompts are read; requests that start in this step are not yet among them
            runner.get_model().planner.all_outputs = bool(runner.num_prompt_logprobs) or any(
                needs_all_outputs(request.sampling_params) for request in scheduler_output.scheduled_new_reqs
            )
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the step's tokens; see vLLM's `Worker.sample_tokens`."""
        is_affected = isinstance(self.model_runner, CPUModelRunner)
        with _generators_of_finished_prompts(self.model_runner) if is_affected else nullcontext():
            return super().sample_tokens(*args, **kwargs)


@contextmanager
def _generators_of_finished_prompts(runner: CPUModelRunner) -> Iterator[None]:
    """Put the generators of requests whose token will be discarded aside.

    Those tokens are drawn from the global generator, so a seeded request draws the same tokens however its
    prompt was cut.
    """
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    aside = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(aside)
