"""The CPU worker: vLLM's, except that a request with a seed survives a prompt of several steps.

Why: after a step that ends inside a prompt, vLLM takes the draw of the discarded token back with `set_offset`, which
    generators on CPUs do not have; a request with a `seed` and a prompt of several steps ends the engine.
Applies to: vLLM 0.31 to 0.33, V1 runner.
Upstream: vllm/v1/worker/gpu_model_runner.py, `_bookkeeping_sync`.
Test: tests/integration/test_worker.py fails once vLLM's own worker does without this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class SeedSafeCPUWorker(CPUWorker):
    """vLLM's CPU worker; requests draw from their own generators only for tokens that count."""

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
