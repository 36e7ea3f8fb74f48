"""What is counted of memories, from the scheduler to Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import prometheus_client
import pytest
from vllm.v1.metrics.loggers import KVConnectorLogging, KVConnectorProm

from tests.support.engines import generate, greedy, scheduler_of
from tests.support.memories import admission_of, ask, ids, memory_engine, save, store_of
from tests.support.small_hf import S, Small
from vllm_armt.memories.engine.metrics import COUNTERS, MemoryStats


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metrics") / "model"
    Small("armt", "llama").build().save_pretrained(directory)
    return directory


def test_uses_loads_saves_and_failures_are_counted(directory: Path, tmp_path: Path) -> None:
    with memory_engine(directory, f"{tmp_path},prefix") as llm:
        counted: Counter[str] = Counter()
        take = admission_of(llm).take_stats

        def take_and_count() -> MemoryStats:
            stats = take()
            counted.update(stats.data)
            return stats

        admission_of(llm).take_stats = take_and_count  # type: ignore[method-assign]
        save(llm, ids(3 * S + 1, 1), "text")
        scheduler_of(llm).reset_prefix_cache()
        ask(llm, [ids(3, 2), ids(3, 3)], memory="text")
        ask(llm, [ids(3, 2)], memory="nothing")
        ask(llm, [ids(S, 4)] * 2, 1, save_memory="same")
        memory = store_of(llm).get("text")
        assert memory.page is not None
        scheduler_of(llm).reset_prefix_cache()
        store_of(llm).pages.path(memory.page).write_bytes(b"")
        ask(llm, [ids(3, 2)], memory="text")
        generate(llm, [ids(2 * S + 1, 9)], greedy(1))
        # nobody waits for what is kept of an ordinary prompt
        while not [entry for entry in store_of(llm).prefix.entries() if entry.key]:
            time.sleep(0.01)
        scheduler_of(llm).reset_prefix_cache()
        generate(llm, [ids(2 * S + 1, 9)], greedy(1))
        connector = scheduler_of(llm).connector
        assert connector is not None
        config = llm.llm_engine.vllm_config
    assert counted == {
        "uses": 2,
        "tokens_not_read": 6 * S,
        "refusals": 1,
        "loads": 1,
        "load_failures": 1,
        "pool_hits": 1,
        "saves": 2,
        "save_failures": 1,
        "prefix_saves": 1,
        "prefix_loads": 1,
    }
    assert counted.keys() == COUNTERS.keys()
    # to the log, added up over an interval
    lines: list[str] = []
    log = KVConnectorLogging(config.kv_transfer_config)
    for _ in range(2):
        log.observe(dict(counted))
    log.log(lambda words, metrics: lines.append(metrics))
    assert "memory uses=4" in lines[0]
    # and to Prometheus
    metrics = KVConnectorProm(config, ["engine"], {0: ["0"]})
    metrics.observe(dict(counted), 0)
    for name, count in counted.items():
        assert prometheus_client.REGISTRY.get_sample_value(f"vllm:armt_memory_{name}_total", {"engine": "0"}) == count
