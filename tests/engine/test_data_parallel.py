"""Two data-parallel replicas: each computes what the authors' code computes, and has a prefix cache of its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from vllm import RequestOutput
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from tests.support.engines import centred, decoded_log_probs, greedy
from tests.support.golden_cases import Golden, relative_l2


async def ask(directory: Path, prompt: list[int], max_tokens: int, replicas: list[int]) -> list[RequestOutput]:
    """What the replicas answer, one after another."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(directory),
            data_parallel_size=2,
            dtype="float32",
            skip_tokenizer_init=True,
            max_logprobs=-1,
            max_num_batched_tokens=128,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 26,
            gpu_memory_utilization=0.01,
        )
    )
    try:
        answers = []
        for i, replica in enumerate(replicas):
            outputs = engine.generate(
                {"prompt_token_ids": prompt}, greedy(max_tokens), f"{i}", data_parallel_rank=replica
            )
            answers.append([output async for output in outputs][-1])
        return answers
    finally:
        engine.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas take their time on one core")
def test_two_replicas_agree_with_the_golden(golden_directory, monkeypatch: pytest.MonkeyPatch):
    golden = Golden("armt_hf_llama")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    generation = max(golden.generations, key=lambda i: len(golden.prompts[i]))
    prompt, expected = golden.prompts[generation].tolist(), golden.tensors[f"gen_tokens.{generation}"]
    answers = asyncio.run(ask(golden_directory(golden), prompt, len(expected), [0, 1, 0]))
    for answer in answers:
        (completion,) = answer.outputs
        assert list(completion.token_ids) == expected.tolist()
        error = relative_l2(centred(decoded_log_probs(answer)), centred(golden.tensors[f"gen_logits.{generation}"]))
        assert error <= golden.tolerance(generation)
    first, other, again = (answer.num_cached_tokens for answer in answers)
    assert first == other == 0
    assert again is not None
    assert again > 0
