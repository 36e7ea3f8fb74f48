"""Two tensor-parallel ranks compute what the authors' code computes on one."""

from __future__ import annotations

import os

import pytest

from tests.support.engines import centred, decoded_log_probs, engine, generate, greedy, prompt_log_probs
from tests.support.golden_cases import Golden, relative_l2

CORES = sorted(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="vLLM binds every rank to a core of its own")
@pytest.mark.parametrize(
    "name",
    ["armt_hf_llama_nodenom", "armt_hf_gpt_neox", "armt_sw_llama", "prmt_gpt2_wrap", "rmt_llama"],
)
def test_two_ranks_agree_with_the_golden(name, golden_directory, monkeypatch):
    """Key-value heads are split over the ranks where there are two, and replicated where there is one."""
    golden = Golden(name)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[1]}")
    with engine(golden_directory(golden), tensor_parallel_size=2) as llm:
        read = generate(llm, golden.prompts, greedy(1, prompt_logprobs=-1))
        params = [greedy(len(golden.tensors[f"gen_tokens.{i}"])) for i in golden.generations]
        decoded = generate(llm, [golden.prompts[i] for i in golden.generations], params)
    for i, prompt in enumerate(golden.prompts):
        if len(prompt) > 1:
            error = relative_l2(centred(prompt_log_probs(read[i])), centred(golden.logits(i)[:-1]))
            assert error <= golden.tolerance(i), f"prompt {i}"
    for i, output in zip(golden.generations, decoded, strict=True):
        assert output.outputs[0].token_ids == golden.tensors[f"gen_tokens.{i}"].tolist()
        error = relative_l2(centred(decoded_log_probs(output)), centred(golden.tensors[f"gen_logits.{i}"]))
        assert error <= golden.tolerance(i), f"generation {i}"
