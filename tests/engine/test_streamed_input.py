"""Streamed input: each turn's log-probabilities are those of the whole text, read anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from vllm import LLM

from tests.support.engines import decoded_log_probs, engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.golden_cases import relative_l2
from tests.support.small_model import GOLDEN, S, log_probs, random_prompt
from tests.support.streams import STOP, Turn, stream

Models = tuple[PreTrainedModel, PreTrainedModel]
TURNS = st.lists(
    st.builds(
        Turn,
        prompt=st.builds(random_prompt, st.integers(1, 3 * S + 2), st.integers(0, 99)),
        new=st.integers(1, 2 * S + 2),
        stops=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module", params=[False, True], ids=["one step at a time", "overlapping steps"])
def llm(request, golden_directory) -> Iterator[LLM]:
    with engine(golden_directory(GOLDEN), overlap=request.param) as llm:
        assert type(scheduler_of(llm)).__name__ == ("AsyncSegmentScheduler" if request.param else "SegmentScheduler")
        yield llm


@pytest.fixture(scope="module")
def models(reference: PreTrainedModel) -> Models:
    """The readable model, and the same in float64."""
    return reference, copy.deepcopy(reference).double()


def assert_computed(models: Models, prompt: list[int], new: list[int], actual: Tensor, message: str) -> None:
    """Compare with float64; where the readable model's own float32 is not near that, memories amplify rounding."""
    rounded, expected = (log_probs(model, prompt + new)[len(prompt) - 1 :] for model in models)
    assert relative_l2(actual, expected) <= max(1e-4, 20 * relative_l2(rounded, expected)), message


def check(llm: LLM, models: Models, turns: list[Turn], waits: bool) -> None:
    text: list[int] = []
    for turn, answer in zip(turns, stream(llm, turns, waits), strict=True):
        text += turn.prompt
        assert len(answer.tokens) == turn.new
        assert answer.tokens[-1] == STOP or not turn.stops
        assert_computed(models, text, answer.tokens, answer.log_probs, f"after {len(text)} tokens")
        # vLLM goes on behind the last token but one
        text += answer.tokens[:-1]
    assert pages_in_use(llm) == 0
    # every memory that the request has left, where it is the last one that a prompt finds
    for output in generate(llm, [text[: end + 1] for end in range(S, len(text), S)], greedy(1)):
        found = f"{output.num_cached_tokens} tokens were found"
        assert_computed(models, output.prompt_token_ids, [0], decoded_log_probs(output), found)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("stop", [2 * S - 2, 2 * S - 1, 2 * S, 2 * S + 1])
def test_a_turn_goes_on_from_where_the_one_before_stopped(llm: LLM, models: Models, stop: int, waits: bool) -> None:
    prompt = random_prompt(S + 3)
    check(llm, models, [Turn(prompt, stop + 1 - len(prompt)), Turn(random_prompt(3 * S + 2), 2)], waits)


@given(TURNS, st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_turns_are_computed_as_the_whole_text(llm: LLM, models: Models, turns: list[Turn], waits: bool) -> None:
    check(llm, models, turns, waits)
