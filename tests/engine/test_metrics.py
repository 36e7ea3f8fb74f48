"""Metrics of segments and of the prefix cache, from the scheduler to Prometheus, beside what the model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import prometheus_client
import pytest
from vllm import LLM

from tests.support.engines import engine, generate, greedy, scheduler_of
from tests.support.small_model import GOLDEN, S, random_prompt
from vllm_armt.executor import step as executor
from vllm_armt.integration.capacity import RequestMemory
from vllm_armt.integration.metrics import COUNTERS
from vllm_armt.integration.prometheus import CountsLogger
from vllm_armt.plan.step import Chunk, Schedule, StepPlan, plan_step

PAGES = 11


@pytest.mark.parametrize("overlap", [False, True])
def test_a_load_is_counted_as_by_hand_and_as_it_is_computed(golden_directory, overlap, monkeypatch) -> None:
    computed: Counter[str] = Counter()

    def plan(chunks: Sequence[Chunk], schedule: Schedule) -> StepPlan:
        plan = plan_step(chunks, schedule)
        waves = [plan.wave] if plan.wave else []
        computed["cells"] += sum(group.cells for wave in waves for group in wave.groups(schedule.num_layers))
        computed["segments"] += sum(len(wave.segments()) for wave in waves) + sum(tail.closes for tail in plan.tails)
        return plan

    monkeypatch.setattr(executor, "plan_step", plan)
    text = random_prompt(5 * S + 3)
    options: dict[str, Any] = {"num_gpu_blocks_override": PAGES + 1, "disable_log_stats": False}
    with engine(golden_directory(GOLDEN), overlap=overlap, **options) as llm:
        config, manager = llm.llm_engine.vllm_config, llm.llm_engine.logger_manager
        assert manager is not None
        logger = CountsLogger(config, manager.engine_indexes, COUNTERS)
        manager.stat_loggers.append(logger)
        # read once, closes two segments, and is found by the same text and by one that goes on from it
        (first,) = generate(llm, [text], greedy(2 * S))
        generate(llm, [text], greedy(1))
        generate(llm, [[*text, *first.outputs[0].token_ids]], greedy(1))
        # more than there is room for; each leaves one memory
        generate(llm, [random_prompt(S + 1, seed=seed) for seed in range(1, PAGES + 9)], greedy(1))
        held = len(scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block)
        counted = counts(llm)
        size = RequestMemory.of(config).bytes
        L = config.model_config.hf_config.base_model_config.num_hidden_layers
        spec = scheduler_of(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec
        assert size == spec.max_memory_usage_bytes(config) * L
        assert sample(llm, "request_bytes") == size
    distinct = PAGES + 8
    # memories after 5, 6 and 7 segments, and those of the distinct texts
    entered = 3 + distinct
    assert counted == {
        "segments_read": 5 + distinct,
        "segments_decoded": 2,
        "cells": L * (5 + distinct),
        "prefix_memories_found": 2,
        "prefix_memories_missed": 1 + distinct,
        "prefix_memories_evicted": entered - held,
        "prefix_tokens_not_read": 5 * S + 7 * S,
    }
    assert computed == {"cells": counted["cells"], "segments": counted["segments_read"] + counted["segments_decoded"]}


def sample(llm: LLM, name: str) -> float:
    labels = {"model_name": llm.llm_engine.model_config.served_model_name, "engine": "0"}
    value = prometheus_client.REGISTRY.get_sample_value(f"vllm:armt_{name}", labels)
    assert value is not None, name
    return value


def counts(llm: LLM) -> dict[str, float]:
    return {name: sample(llm, f"{name}_total") for name in COUNTERS}
