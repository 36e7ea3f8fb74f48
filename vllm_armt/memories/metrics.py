"""What is counted of memories: in vLLM's log, and for Prometheus as `vllm:armt_memory_...`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTERS = {
    "uses": "Requests that went on from a memory.",
    "tokens_not_read": "Tokens of closed segments that memories stood for, which were not read again.",
    "refusals": "Requests that asked something of memories that could not be done.",
    "loads": "Pages of memories that were brought from disk for a request.",
    "load_failures": "Requests that failed because the page of their memory could not be read.",
    "pool_hits": "Requests whose memory was still in the cache's pool, or had no page.",
    "saves": "Memories, and checkpoints of memories in progress, that were saved.",
    "save_failures": "Memories that could not be saved.",
    "prefix_loads": "Pages of ordinary prompts that were brought from disk.",
    "prefix_saves": "Pages of ordinary prompts that were saved.",
}


class MemoryStats(KVConnectorStats):
    """Counts since the last report; `data` by the names above, those that are 0 left out."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return MemoryStats(dict(Counter(self.data) + Counter(other.data)))

    def reduce(self) -> dict[str, int | float]:
        """What the log says of an interval."""
        return {f"memory {name.replace('_', ' ')}": count for name, count in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class MemoryPromMetrics(KVConnectorPromMetrics):
    """Prometheus's counters of one front end."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=f"vllm:armt_memory_{name}", documentation=words, labelnames=self._labelnames),
                self.per_engine_labelvalues,
            )
            for name, words in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)
