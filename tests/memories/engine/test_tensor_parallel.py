"""A memory that one rank has saved is used by two, and the other way round."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.engines import engine, generate, greedy
from tests.support.memories import ask, distance, ids, info, memory_engine, save, tolerance
from tests.support.small_hf import S, Small

CORES = sorted(os.sched_getaffinity(0))
TEXT = ids(3 * S + 3, 1)
QUESTIONS = [ids(length, length) for length in (3, S, 2 * S + 1)]


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="vLLM binds every rank to a core of its own")
def test_one_rank_and_two_share_memories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a window sees are sharded by head; all else is the same on every rank."""
    directory, folder = tmp_path / "model", tmp_path / "memories"
    Small("armt_sw", "llama", {"use_sink": True}).build().save_pretrained(directory)
    whole = [TEXT + question for question in QUESTIONS]
    with engine(directory, max_num_batched_tokens=24, schedule="sequential") as llm:
        otherwise = generate(llm, whole, greedy(S))
    with memory_engine(directory, folder) as llm:
        expected = generate(llm, whole, greedy(S))
        save(llm, TEXT, "by-one")
    with monkeypatch.context() as two_ranks:
        two_ranks.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[1]}")
        with memory_engine(directory, folder, tensor_parallel_size=2) as llm:
            on_two = generate(llm, whole, greedy(S))
            allowed = tolerance(expected, otherwise, on_two)
            assert distance(ask(llm, QUESTIONS, S, memory="by-one"), expected) <= allowed
            save(llm, TEXT[: S + 2], "by-two")
            (appended,) = ask(llm, [TEXT[S + 2 :]], 1, memory="by-two", save_memory={"after": "prompt"})
            assert "id" in info(appended)["saved"]
            assert distance(ask(llm, QUESTIONS, S, memory="by-two"), expected) <= allowed
            (lost,) = ask(llm, QUESTIONS[:1], memory="nothing")
            assert lost.outputs[0].finish_reason == "error"
    with memory_engine(directory, folder) as llm:
        assert distance(ask(llm, QUESTIONS, S, memory="by-two"), expected) <= allowed
