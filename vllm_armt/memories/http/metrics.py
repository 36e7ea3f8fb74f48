"""Prometheus metrics of a server's folder of memories and of what it reads; `memories.metrics` has the engine's.

As vLLM's they are by model, and over all API servers of an engine.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge


@cache
def _metrics() -> tuple[Gauge, Gauge, Counter]:
    """A process registers them once."""
    # every API server sees the same folder
    held, size = (
        Gauge(f"vllm:armt_memory_{name}", words, ["model_name"], multiprocess_mode="mostrecent")
        for name, words in (
            ("held", "Complete memories in the folder, of all tenants."),
            ("bytes", "Bytes of this model's files in the folder of memories."),
        )
    )
    builds = Counter("vllm:armt_memory_builds", "Texts that clients sent to be read.", ["model_name", "outcome"])
    return held, size, builds


class Metrics:
    """Of one served model."""

    def __init__(self, model: str) -> None:
        held, size, self._builds = _metrics()
        self._held, self._bytes, self._model = held.labels(model), size.labels(model), model
        for outcome in ("completed", "failed"):
            self._builds.labels(model, outcome)

    def built(self, outcome: str) -> None:
        """Count a build that has "completed" or "failed"."""
        self._builds.labels(self._model, outcome).inc()

    def hold(self, memories: int, size: int) -> None:
        """What is in the folder, in memories and bytes."""
        self._held.set(memories)
        self._bytes.set(size)
