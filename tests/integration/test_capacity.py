"""The paragraph that a worker begins with: numbers, and what it says where something is otherwise."""

from __future__ import annotations

import pytest
from vllm.config import VllmConfig

from vllm_armt.integration.capacity import RequestMemory, paragraph

POOL = 20
"""Pages, one of which is vLLM's."""


@pytest.fixture
def measured(vllm_config: VllmConfig) -> VllmConfig:
    vllm_config.cache_config.num_gpu_blocks = POOL
    return vllm_config


def test_it_says_what_a_request_takes_and_how_many_fit(measured: VllmConfig) -> None:
    memory = RequestMemory.of(measured)
    assert memory.bytes == 3 * memory.page_bytes
    said = paragraph(measured, "sdpa")
    assert "Serving armt on llama: segments of S = 16 tokens with m = 4 memory tokens, schedule 'auto'" in said
    assert f"takes {memory.bytes / 1e3:,.1f} kB of cache, however long its text is (3 pages" in said
    assert f"{(POOL - 1) // 3} requests fit at a time, and --max-num-seqs lets 8 run" in said
    assert "No memories are kept" in said
    assert "steps do not overlap here" in said


def test_steps_that_overlap_hold_more_pages(measured: VllmConfig) -> None:
    measured.scheduler_config.async_scheduling = True
    assert RequestMemory.of(measured).pages == 5
    said = paragraph(measured, "sdpa")
    assert f"{(POOL - 1) // 5} requests fit at a time" in said
    assert "steps overlap (--async-scheduling)" in said


def test_it_says_where_memories_are_and_what_an_open_segment_takes(
    measured: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.additional_config = {"armt": {"memories": "/srv/memories,prefix", "schedule": "diagonal"}}
    monkeypatch.setattr(measured.model_config.hf_config, "generation_policy", "open")
    measured.parallel_config.tensor_parallel_size = 2
    said = paragraph(measured, "sdpa")
    assert "schedule 'diagonal'" in said
    assert f"takes {RequestMemory.of(measured).bytes / 1e3:,.1f} kB of cache on each of 2 ranks" in said
    assert "Memories are kept in /srv/memories, and those of ordinary prompts." in said
    assert "for each S tokens that it generates beyond its last segment, which stays open, a page more" in said
