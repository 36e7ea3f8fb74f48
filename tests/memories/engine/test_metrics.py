"""What is counted of memories."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.engines import generate, greedy, scheduler_of
from tests.support.memories import admission_of, ask, ids, memory_engine, save, store_of
from tests.support.small_hf import S, Small
from vllm_armt.memories.engine.metrics import COUNTERS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metrics") / "model"
    Small("armt", "llama").build().save_pretrained(directory)
    return directory


def test_uses_loads_saves_and_failures_are_counted(directory: Path, tmp_path: Path) -> None:
    with memory_engine(directory, f"{tmp_path},prefix") as llm:
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
        counted = admission_of(llm).take_counts()
        assert admission_of(llm).take_counts() == {}
    assert counted == {
        "memory_uses": 2,
        "memory_tokens_not_read": 6 * S,
        "memory_refusals": 1,
        "memory_loads": 1,
        "memory_load_failures": 1,
        "memory_pool_hits": 1,
        "memory_saves": 2,
        "memory_save_failures": 1,
        "memory_prefix_saves": 1,
        "memory_prefix_loads": 1,
    }
    assert counted.keys() == COUNTERS.keys()
