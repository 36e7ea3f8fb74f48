"""Real input: SmolLM2-135M-Instruct, and a fresh ARMT around it, which inside one segment is the same model."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from examples.smollm2 import QUESTION, make_smollm2
from tests.support.engines import engine, generate
from vllm_armt.checkpoints import init_from_base

S = 256
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters. "
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return make_smollm2()


@pytest.fixture(scope="module")
def armt(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2") / "armt"
    init_from_base(str(base), directory, segment_size=S, num_mem_tokens=16, d_mem=32)
    return directory


def serve(directory, **options):
    given = {
        "skip_tokenizer_init": False,
        "max_model_len": 8192,
        "max_num_batched_tokens": 1024,
        # the base model's keys of so many tokens
        "kv_cache_memory_bytes": 1 << 29,
    }
    return engine(directory, **given | options)


def chosen_log_probs(llm, tokens: list[int]) -> torch.Tensor:
    """[T - 1] log-probability of every token of a text after the first."""
    (output,) = generate(llm, [tokens], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    return torch.tensor([row[token].logprob for row, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)])


def test_inside_one_segment_the_armt_is_the_base_model(base, armt):
    with serve(base, enforce_eager=True) as llm:
        tokens = llm.get_tokenizer().encode(TEXT * 4)[: S - 1]
        expected = chosen_log_probs(llm, tokens)
    with serve(armt) as llm:
        actual = chosen_log_probs(llm, tokens)
    assert len(tokens) == S - 1
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)


def test_it_answers_and_a_conversation_goes_on_over_several_segments(armt):
    messages = [{"role": "user", "content": QUESTION}]
    with serve(armt, dtype="bfloat16") as llm:
        params = SamplingParams(temperature=0, max_tokens=16)
        (first,) = llm.chat(messages, params, use_tqdm=False)
        assert "Paris" in first.outputs[0].text
        for turn in range(3):
            messages += [
                {"role": "assistant", "content": "I see."},
                {"role": "user", "content": f"{TEXT * (turn + 1)}\nNow tell me: {QUESTION}"},
            ]
            (answer,) = llm.chat(messages, params, use_tqdm=False)
            assert answer.outputs[0].text.strip()
        assert len(answer.prompt_token_ids) > 2 * S
        assert answer.num_cached_tokens >= S
