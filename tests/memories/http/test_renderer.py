"""Prompts behind memories, and what of them is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_armt.memories.errors import InvalidInput
from vllm_armt.memories.http.renderer import MemoryRenderer, _args_of

MEMORY: Any = SimpleNamespace(tokens=40, last=range(16), pending=range(8))


def renderer(bos: str | None = "<s>", max_model_len: int = 32) -> Any:
    tokenizer = SimpleNamespace(bos_token=bos)
    return SimpleNamespace(
        renderer=SimpleNamespace(get_tokenizer=lambda: tokenizer),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )


def test_the_token_that_begins_a_text_does_not_stand_within_one():
    for bos, memory, expected in (("<s>", MEMORY, "a<s>"), ("<s>", None, "<s>a<s>"), (None, MEMORY, "<s>a<s>")):
        assert MemoryRenderer._behind(renderer(bos), memory, "<s>a<s>") == expected


def test_a_question_needs_room_behind_the_end_of_the_memory():
    MemoryRenderer._check_length(renderer(), MEMORY, 7)
    with pytest.raises(InvalidInput, match=r"8 tokens and stands behind 24 .* together 32, but fewer than .*\(32\)"):
        MemoryRenderer._check_length(renderer(), MEMORY, 8)
    with pytest.raises(InvalidInput, match="at least one token"):
        MemoryRenderer._check_length(renderer(), MEMORY, 0)


def test_requests_that_ask_nothing_of_memories_are_left_alone():
    for xargs in (None, {}, {"other": 1}, {"memory": None}):
        assert _args_of(SimpleNamespace(vllm_xargs=xargs, echo=True, use_beam_search=True, n=4)) is None


@pytest.mark.parametrize("field", ["prompt_embeds", "use_beam_search", "echo"])
def test_what_knows_no_memories_is_refused(field):
    with pytest.raises(InvalidInput, match=r"(?i)embed|beam|echo"):
        _args_of(SimpleNamespace(vllm_xargs={"memory": "book"}, **{field: b"x"}))
