"""What a request may ask of memories."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from vllm_armt.memories.args import MemoryArgs, SaveArgs
from vllm_armt.memories.errors import InvalidInput


def parsed(**extra: Any) -> MemoryArgs | None:
    return MemoryArgs.of(SamplingParams(extra_args=extra))


def test_a_request_that_asks_for_nothing_is_an_ordinary_one() -> None:
    assert MemoryArgs.of(None) is None
    assert MemoryArgs.of(SamplingParams()) is None
    assert parsed(other=1, memory=None) is None


def test_a_name_an_object_and_its_json_mean_the_same() -> None:
    for form in ("talk", {"name": "talk"}, '{"name": "talk"}'):
        assert parsed(save_memory=form) == MemoryArgs(save_memory=SaveArgs(name="talk"))


def test_only_what_was_given_is_passed_on_to_the_store() -> None:
    assert SaveArgs.of({}).options == {}
    assert SaveArgs.of({"name": None, "after": "prompt"}).options == {"name": None}
    assert SaveArgs.of({"roles": ["user"], "metadata": {"a": "b"}}).options == {
        "roles": ("user",),
        "metadata": {"a": "b"},
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"save_memory": 3}, "must be a name or an object"),
        ({"save_memory": "{"}, "must be a name or an object"),
        ({"save_memory": {"after": "noon"}}, "after"),
        ({"save_memory": {"name": "../up"}}, "can't be the name"),
        ({"save_memory": {"metadata": {str(i): "" for i in range(17)}}}, "metadata"),
        ({"save_memory": {"expires_after": {"anchor": "created_at", "seconds": 0}}}, "seconds"),
        ({"memory": "a", "memory_skip": True}, "memory_skip is True"),
        ({"build_memory": "a", "save_memory": "b"}, "alone"),
    ],
)
def test_what_is_not_allowed_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parsed(**given)


def test_what_ends_or_splits_a_request_outside_the_engine_does_not_go_with_saving() -> None:
    with pytest.raises(InvalidInput, match="stop_token_ids"):
        MemoryArgs.of(SamplingParams(stop=["."], extra_args={"save_memory": "a"}))
    with pytest.raises(InvalidInput, match="n is 2"):
        MemoryArgs.of(SamplingParams(n=2, temperature=1, extra_args={"save_memory": "a"}))
    assert MemoryArgs.of(SamplingParams(n=2, stop=["."], temperature=1, extra_args={"memory": "a"}))


def test_log_probabilities_of_a_prompt_can_be_had_only_without_a_memory_before_it() -> None:
    assert MemoryArgs.of(SamplingParams(prompt_logprobs=1, extra_args={"save_memory": "a"}))
    with pytest.raises(InvalidInput, match="prompt_logprobs"):
        MemoryArgs.of(SamplingParams(prompt_logprobs=1, extra_args={"memory": "a"}))
