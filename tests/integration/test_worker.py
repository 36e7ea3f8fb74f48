"""A request's own seed on CPUs: vLLM's worker dies of it in a prompt of several steps, ours does not."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform

from tests.support.engines import engine, generate
from tests.support.golden_cases import Golden

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="only CPU generators have no offset")

GOLDEN = Golden("armt_hf_llama")
PROMPT = list(range(100))
VLLMS_OWN = "vllm.v1.worker.cpu_worker.CPUWorker"


def sample(llm, seed: int) -> list[int]:
    params = SamplingParams(temperature=1, seed=seed, max_tokens=40, ignore_eos=True, detokenize=False)
    # beside a request without a seed
    (output, _) = generate(llm, [PROMPT, PROMPT[::-1]], [params, SamplingParams(max_tokens=5, detokenize=False)])
    return list(output.outputs[0].token_ids)


def test_a_seed_gives_the_same_tokens_in_however_many_steps_the_prompt_is_read(golden_directory):
    with engine(golden_directory(GOLDEN), max_num_batched_tokens=40, enable_prefix_caching=False) as llm:
        several = [sample(llm, seed=5), sample(llm, seed=5), sample(llm, seed=6)]
    with engine(golden_directory(GOLDEN), max_num_batched_tokens=400) as llm:
        one = sample(llm, seed=5)
    assert several[:2] == [one, one]
    assert several[2] != one


def test_vllms_own_worker_still_needs_it(golden_directory):
    """If this fails, vllm_armt/worker.py and its line in the config hook can go."""
    with (
        pytest.raises(RuntimeError, match="does not use offset"),
        engine(golden_directory(GOLDEN), max_num_batched_tokens=40, worker_cls=VLLMS_OWN) as llm,
    ):
        sample(llm, seed=5)
