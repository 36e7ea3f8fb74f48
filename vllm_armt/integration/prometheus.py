"""A server's half of what schedulers count: metrics for Prometheus beside vLLM's, and a line in the log.

Our endpoint plugin adds it to the loggers of a server, so other models see no difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_armt.integration.capacity import RequestMemory
from vllm_armt.integration.metrics import take

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


class CountsLogger(AggregateStatLoggerBase):
    """A server's half: vLLM gives it every engine's statistics, as they come.

    Args:
        vllm_config: of the engines.
        engine_indexes: of those that this server talks to.
        counters: what each name counts.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int], counters: Mapping[str, str]) -> None:
        model = vllm_config.model_config.served_model_name
        labels, values = ["model_name", "engine"], {i: [model, str(i)] for i in engine_indexes}
        size = prometheus_client.Gauge(
            "vllm:armt_request_bytes",
            "Bytes of cache that a request takes at most on a rank, whatever its length.",
            labels,
            multiprocess_mode="mostrecent",
        )
        for gauge in create_metric_per_engine(size, values).values():
            gauge.set(RequestMemory.of(vllm_config).bytes)
        self._counters = {
            name: create_metric_per_engine(prometheus_client.Counter(f"vllm:armt_{name}", words, labels), values)
            for name, words in counters.items()
        }
        self._of_interval: Counter[str] = Counter()

    @classmethod
    def join(cls, client: EngineClient, counters: Mapping[str, str]) -> None:
        """Be one of the loggers of a server, if it has any (not with --disable-log-stats)."""
        manager = client.logger_manager if isinstance(client, AsyncLLM) else None
        if manager is not None:
            manager.stat_loggers.append(cls(client.vllm_config, manager.engine_indexes, counters))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what an engine has sent."""
        if scheduler_stats is None:
            return
        counts = take(scheduler_stats)
        for name, count in counts.items():
            self._counters[name][engine_idx].inc(count)
        self._of_interval.update(counts)

    def log(self) -> None:
        """Say what was counted since the last line, beside vLLM's own line of throughput."""
        if self._of_interval:
            words = (f"{name.replace('_', ' ')}: {count}" for name, count in self._of_interval.items())
            logger.info("Counted meanwhile: %s.", ", ".join(words))
            self._of_interval.clear()

    def log_engine_initialized(self) -> None:
        """vLLM has nothing more to say once an engine has started."""
