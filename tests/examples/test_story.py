"""The document of the demo: a story in a text, and every question about it."""

from __future__ import annotations

import pytest

from examples.story import hide_story
from tests.support.solver import solve


@pytest.mark.parametrize("length", [600, 5000])
def test_facts_stand_in_the_text_where_it_says_and_every_person_can_be_asked_for(
    tokenizer,
    background,
    length: int,
) -> None:
    document = hide_story(tokenizer, background, length, facts=9, seed=3)
    assert len(document.ids) == length
    assert len(document.facts) == 9
    for fact, start in zip(document.facts, document.starts, strict=True):
        assert tokenizer.decode(document.ids[start:]).startswith(f" {fact.text}")
    texts = [fact.text for fact in document.facts]
    assert {question.about for question in document.questions} == {fact.about for fact in document.facts}
    assert len({question.text for question in document.questions}) == len(document.questions)
    for question in document.questions:
        assert question.answer == solve(texts, question.text)
        assert texts[question.supports[-1]].endswith(f"{question.answer}.")


def test_facts_lie_at_even_distances(tokenizer, background) -> None:
    starts = hide_story(tokenizer, background, 20_000, facts=10, seed=0).starts
    assert starts[0] == 0
    assert all(abs(start - 2000 * i) < 200 for i, start in enumerate(starts))


def test_seeds_hide_different_stories(tokenizer, background) -> None:
    one, again, other = (hide_story(tokenizer, background, 2000, facts=6, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.facts != other.facts
