"""Requests that ask for every output of their prompt, beside those that need the last one alone."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.engines import decoded_log_probs, engine, generate, greedy, prompt_log_probs
from tests.support.golden_cases import Golden
from vllm_armt.executor.step import Planner

GOLDEN = Golden("armt_hf_llama")
S = GOLDEN.args["segment_size"]


def test_all_outputs_are_computed_only_in_steps_with_a_request_that_asks_for_them(golden_directory, monkeypatch):
    asked: list[bool] = []
    step = Planner.step

    def recorded(planner: Planner, *args: Any) -> Any:
        asked.append(planner.all_outputs)
        return step(planner, *args)

    monkeypatch.setattr(Planner, "step", recorded)
    prompt = GOLDEN.prompts[-1]
    a, b = prompt[: 4 * S], prompt.flip(0)[: 3 * S]
    with engine(golden_directory(GOLDEN), enable_prefix_caching=False) as llm:
        asked.clear()
        (both_a, both_b) = generate(llm, [a, b], [greedy(2, prompt_logprobs=-1), greedy(2)])
        together = asked.copy()
        asked.clear()
        (alone,) = generate(llm, [a], greedy(2))
        (other,) = generate(llm, [b], greedy(2))
    assert together == [True, False]
    assert asked == [False] * 4
    assert len(prompt_log_probs(both_a)) == len(a) - 1
    for x, y in ((both_a, alone), (both_b, other)):
        torch.testing.assert_close(decoded_log_probs(x), decoded_log_probs(y), atol=1e-5, rtol=0)
