"""What a server does to requests besides computing them: caching, preemption, overlap, abort, long prompts."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from tests.support.engines import (
    decoded_log_probs,
    engine,
    generate,
    greedy,
    pages_in_use,
    recorded_preemptions,
    scheduler_of,
)
from tests.support.golden_cases import Golden, relative_l2
from tests.support.small_model import GOLDEN, S, log_probs, random_prompt, random_prompts


def assert_equal_to_reference(outputs, reference, tolerance: float = 1e-4) -> None:
    for output in outputs:
        prompt, new = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        expected = log_probs(reference, prompt + new)[len(prompt) - 1 :]
        assert relative_l2(decoded_log_probs(output), expected) < tolerance


def check_preempted_requests(llm, reference) -> None:
    preempted = recorded_preemptions(llm)
    # short prompts are admitted with a page each and need two later
    outputs = generate(llm, random_prompts([5, 3, 9, 40, 7, 12, 2, 8, 61, 16, 17, 120]), greedy(60))
    assert any(preemption.generated and preemption.computed % S for preemption in preempted), "inside a segment"
    assert_equal_to_reference(outputs, reference)
    assert pages_in_use(llm) == 0


def test_preempted_requests_resume_exactly(golden_directory, reference):
    with engine(golden_directory(GOLDEN), num_gpu_blocks_override=10) as llm:
        check_preempted_requests(llm, reference)


def test_preempted_requests_resume_exactly_under_asynchronous_scheduling(golden_directory, reference):
    with engine(golden_directory(GOLDEN), overlap=True, num_gpu_blocks_override=14) as llm:
        assert type(scheduler_of(llm)).__name__ == "AsyncSegmentScheduler"
        check_preempted_requests(llm, reference)


@pytest.mark.parametrize("caching", [True, False])
def test_a_conversation_resumes_from_its_last_memory(golden_directory, reference, caching):
    """Each turn's prompt is the text so far and something new, as chat clients send it."""
    text = random_prompt(50)
    with engine(golden_directory(GOLDEN), enable_prefix_caching=caching) as llm:
        for turn in range(4):
            (output,) = generate(llm, [text], greedy(23))
            assert_equal_to_reference([output], reference)
            if turn and caching:
                # all but the segments touched since: the open one, and those of the new words
                assert output.num_cached_tokens >= (len(text) - 23 - 9) // S * S - S
            else:
                assert output.num_cached_tokens == 0
            text = text + list(output.outputs[0].token_ids) + random_prompt(9, seed=turn)


def test_equal_requests_that_arrive_together_agree(golden_directory, reference):
    prompt = random_prompt(100)
    with engine(golden_directory(GOLDEN)) as llm:
        outputs = generate(llm, [prompt] * 6, greedy(20))
    assert_equal_to_reference(outputs, reference)
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= 5


def test_several_samples_share_the_prompt(golden_directory):
    prompt = random_prompt(100)
    with engine(golden_directory(GOLDEN)) as llm:
        params = SamplingParams(n=3, temperature=1.0, max_tokens=40, ignore_eos=True, detokenize=False)
        (output,) = generate(llm, [prompt], params)
        assert pages_in_use(llm) == 0
    samples = {tuple(sample.token_ids) for sample in output.outputs}
    assert len(samples) == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_holds_few_pages_whatever_its_length(golden_directory, overlap):
    """200 segments are prefilled and then decoded; pages in use are read after every step."""
    with engine(golden_directory(GOLDEN), overlap=overlap) as llm:
        held = step_through(llm, random_prompt(200 * S + 3), max_tokens=50)
        assert pages_in_use(llm) == 0
    # with overlapping steps, the step in flight holds the pages that it reads, too
    assert 1 <= max(held) <= (5 if overlap else 3)
    assert len(held) > 200 * S // 128 + 40


def step_through(llm, prompt: list[int], max_tokens: int) -> list[int]:
    """Run one request step by step; the pages in use after each."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("long", {"prompt_token_ids": prompt}, params)
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        held.append(pages_in_use(llm))
    return held[:-1]


def test_an_abort_in_the_middle_of_prefill_frees_its_pages_and_leaves_others_alone(golden_directory, reference):
    with engine(golden_directory(GOLDEN)) as llm:
        params = greedy(30)
        llm.llm_engine.add_request("doomed", {"prompt_token_ids": random_prompt(100 * S)}, params)
        for _ in range(3):
            llm.llm_engine.step()
        assert pages_in_use(llm) > 0
        llm.llm_engine.abort_request(["doomed"])
        outputs = generate(llm, random_prompts([70, 20]), params)
        assert pages_in_use(llm) == 0
    assert_equal_to_reference(outputs, reference)


def test_long_and_short_documents_share_steps(golden_directory, reference):
    with engine(golden_directory(GOLDEN), max_num_batched_tokens=64) as llm:
        outputs = generate(llm, random_prompts([40 * S + 5, 3, 2 * S, 17 * S + 1, 8, 1]), greedy(20))
    assert_equal_to_reference(outputs, reference)


def test_bfloat16_state_halves_the_memory_and_stays_close(golden_directory, reference, tmp_path):
    GOLDEN.copy_checkpoint(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"d_mem": 8', '"d_mem": 8, "state_dtype": "bfloat16"'))
    with engine(tmp_path / "model") as llm:
        outputs = generate(llm, random_prompts([70, 130]), greedy(20))
        layout = scheduler_of(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec
    assert_equal_to_reference(outputs, reference, tolerance=0.05)
    M_and_z = 6 * 8 * (64 + 1)
    assert 2 * M_and_z <= layout.page_size_bytes < 4 * M_and_z


def test_generation_in_a_segment_that_stays_open_survives_preemption(golden_directory):
    """The released v1 code never closes the prompt's last segment, however long it gets."""
    golden = Golden("armt_llama_untied")
    S = golden.args["segment_size"]
    prompts, params = random_prompts([2 * S - 5, 2 * S + 1, 2 * S, 5, 7 * S + 3]), greedy(3 * S)
    with engine(golden_directory(golden), max_model_len=20 * S) as llm:
        expected = generate(llm, prompts, params)
    with engine(golden_directory(golden), max_model_len=20 * S, num_gpu_blocks_override=11) as llm:
        preempted = recorded_preemptions(llm)
        outputs = generate(llm, prompts, params)
        assert preempted
        assert pages_in_use(llm) == 0
    for a, b in zip(outputs, expected, strict=True):
        assert (a.outputs[0].finish_reason, len(a.outputs[0].token_ids)) == ("length", 3 * S)
        assert relative_l2(decoded_log_probs(a), decoded_log_probs(b)) < 1e-4
