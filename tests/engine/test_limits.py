"""Limits that are lowered, raised or unusual: the engine starts, and computes the same."""

from __future__ import annotations

import pytest

from tests.support.engines import decoded_log_probs, engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.golden_cases import relative_l2
from tests.support.small_model import GOLDEN, S, log_probs, random_prompt


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"max_model_len": 3_000_000, "max_num_batched_tokens": 512, "max_num_seqs": 256}, (89, 512, 0)),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 5}, (5, S + 5, 0)),
        ({"max_num_batched_tokens": 1, "max_num_seqs": 1}, (1, S + 1, 0)),
        ({"max_num_batched_tokens": 16, "long_prefill_token_threshold": 1}, (8, S + 8, S)),
        ({"long_prefill_token_threshold": 16}, (8, 128, S)),
        ({"long_prefill_token_threshold": 3 * S + 1, "max_num_batched_tokens": 99}, (8, 99, 4 * S)),
        ({"max_model_len": 150, "max_num_batched_tokens": 8192}, (8, 8192, 0)),
        ({"num_gpu_blocks_override": 5, "schedule": "sequential"}, (8, 128, 0)),
        ({"num_gpu_blocks_override": 4, "enable_prefix_caching": False, "schedule": "diagonal"}, (8, 128, 0)),
        ({"block_size": S, "scheduling_policy": "priority", "enforce_eager": True}, (8, 128, 0)),
        ({"max_num_batched_tokens": 1000, "max_num_seqs": 3, "schedule": "diagonal"}, (3, 1000, 0)),
    ],
    ids=str,
)
def test_any_limits_end_in_the_same_output(golden_directory, reference, options, limits):
    prompts = [random_prompt(length, seed=length) for length in (7 * S + 3, 1, S, 50, 3)]
    with engine(golden_directory(GOLDEN), **options) as llm:
        config = llm.llm_engine.vllm_config.scheduler_config
        actual = (config.max_num_seqs, config.max_num_batched_tokens, config.long_prefill_token_threshold)
        outputs = generate(llm, prompts, greedy(20))
        assert pages_in_use(llm) == 0
        assert scheduler_of(llm).max_num_scheduled_tokens >= S
    assert actual == limits
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)
        assert relative_l2(decoded_log_probs(output), log_probs(reference, tokens)[len(prompt) - 1 :]) < 1e-4
