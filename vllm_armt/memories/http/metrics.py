"""Prometheus metrics of memories, beside vLLM's and as these are: by model, and over all API servers of an engine."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge


@cache
def _metrics() -> dict[str, Any]:
    """A process registers them once."""
    model = ["model_name"]
    counters = {
        "loads": "Memories whose page was brought from the folder for a request.",
        "pool_hits": "Memories whose page was still in the engine's pool when a request came.",
        "saves": "Memories that were made.",
        "failures": "Requests and builds that failed for a memory.",
        "tokens_not_read": "Tokens that memories stood for, which were not read again.",
    }
    gauges = {
        "held": "Complete memories in the folder, of all tenants.",
        "bytes": "Bytes of this model's files in the folder of memories.",
    }
    # every API server sees the same folder
    return {name: Counter(f"vllm:armt_memory_{name}", text, model) for name, text in counters.items()} | {
        name: Gauge(f"vllm:armt_memory_{name}", text, model, multiprocess_mode="mostrecent")
        for name, text in gauges.items()
    }


class Metrics:
    """Of one served model."""

    def __init__(self, model: str) -> None:
        self._of = {name: metric.labels(model) for name, metric in _metrics().items()}

    def count(self, report: dict[str, Any]) -> None:
        """Count what the engine reports of a request."""
        if (used := report.get("used")) is not None:
            if used["segments"]:
                self._of["loads" if used["loaded"] else "pool_hits"].inc()
            self._of["tokens_not_read"].inc(used["tokens"])
        saved = report.get("saved", {})
        if "id" in saved:
            self._of["saves"].inc()
        if "error" in report or "error" in saved:
            self._of["failures"].inc()

    def built(self, succeeded: bool) -> None:
        """Count a build."""
        self._of["saves" if succeeded else "failures"].inc()

    def hold(self, memories: int, size: int) -> None:
        """What is in the folder, in memories and bytes."""
        self._of["held"].set(memories)
        self._of["bytes"].set(size)
