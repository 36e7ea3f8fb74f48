"""Samples: what is said of a prompt is what its tokens say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_armt.babilong import TASKS, Cell, Encoder, Question, Samples, is_right, task_named

names = st.sampled_from(list(TASKS))


@settings(max_examples=100, deadline=None)
@given(name=names, length=st.sampled_from([0, 2000, 5000]), index=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_positions_hold_after_tokenisation(tokenizer, background, name, length, index, seed) -> None:
    samples = Samples(tokenizer, background, seed=seed, segment_size=64, cut=0.3, mentions=2)
    sample = samples.sample(task_named(name), Cell(name, length), index)
    story = sample.story
    if length:
        assert len(sample.ids) == length
    for fact, start in zip(story.facts, sample.starts, strict=True):
        text = tokenizer.decode(sample.ids[start : start + len(samples.encode(f" {fact.text}"))])
        assert text == f" {fact.text}"
    text = tokenizer.decode(sample.ids)
    assert text.endswith(f" {story.question.text}")
    assert sample.supports == tuple(sample.starts[i] for i in story.question.supports)
    assert sample.depth == sample.supports[0] / len(sample.ids)
    spans = [(sample.starts[i], len(samples.encode(f" {story.facts[i].text}"))) for i in story.question.supports]
    assert sample.is_cut == any(start // 64 != (start + size - 1) // 64 for start, size in spans)
    again = samples.sample(task_named(name), Cell(name, length), index)
    assert (again.ids == sample.ids).all()


def test_the_first_needed_fact_goes_through_all_depths(tokenizer, background) -> None:
    samples = Samples(tokenizer, background)
    task, cell = task_named("qa2"), Cell("qa2", 20_000)
    for index in range(20):
        depth = samples.sample(task, cell, index).depth
        # to the nearest sentence, and the story itself takes room
        assert index % 10 / 10 - 0.02 <= depth <= (index % 10 + 1) / 10 + 0.02


def test_facts_are_cut_as_often_as_asked_for(tokenizer, background) -> None:
    def share(cut: float) -> float:
        samples = Samples(tokenizer, background, segment_size=256, cut=cut)
        found = [samples.sample(task_named("qa1"), Cell("qa1", 4000), i).is_cut for i in range(100)]
        return sum(found) / len(found)

    assert share(0) < 0.15
    assert 0.35 < share(0.5) < 0.75
    assert share(1) == 1


def test_samples_are_the_same_for_a_model_without_segments(tokenizer, background) -> None:
    with_segments, without = (Samples(tokenizer, background, segment_size=S, mentions=1.0) for S in (256, None))
    for index in range(10):
        one, other = (s.sample(task_named("qa1"), Cell("qa1", 3000), index) for s in (with_segments, without))
        assert (one.ids == other.ids).all()


def test_sentences_with_names_are_strewn_in(tokenizer, background) -> None:
    def names_in(mentions: float) -> int:
        sample = Samples(tokenizer, background, mentions=mentions).sample(
            task_named("rewrite"), Cell("rewrite", 20_000), 0
        )
        return tokenizer.decode(sample.ids).count("Mary")

    assert names_in(5) > names_in(0) + 60


def test_prompts_for_models_that_were_not_trained_explain_the_task(tokenizer, background) -> None:
    samples = Samples(tokenizer, background, prompt="instruct")
    sample = samples.sample(task_named("qa5"), Cell("qa5", 3000), 0)
    text = tokenizer.decode(sample.ids)
    assert text.startswith("Some sentences in the text below tell facts about Bill, Fred,")
    assert text.endswith(f"\n</context>\nQuestion: {sample.story.question.text}\nAnswer:")
    assert "<context>\n" in text
    assert len(sample.ids) == 3000


def test_the_longest_prompt_is_as_long_as_asked_for_or_as_its_story(tokenizer, background) -> None:
    samples = Samples(tokenizer, background)
    short = Cell("qa3", 0)
    stories = [len(samples.sample(task_named("qa3"), short, i).ids) for i in range(5)]
    assert samples.longest([short], 5) == max(stories) > stories[0]
    assert samples.longest([short], 1) == stories[0]
    assert samples.longest([Cell("qa1", 2000), short, Cell("qa1", 1000)], 5) == 2000
    assert samples.longest([Cell("qa1", 20), short], 5) == max(stories)


def test_what_cannot_be_made_is_refused(tokenizer, background) -> None:
    with pytest.raises(ValueError, match=r"cut is 0\.5, but .* Give the segment size \(--segment-size\)"):
        Samples(tokenizer, background, cut=0.5)
    with pytest.raises(ValueError, match="there is no background text"):
        Samples(tokenizer, None).sample(task_named("qa1"), Cell("qa1", 1000), 0)
    with pytest.raises(ValueError, match="20 tokens were asked for"):
        Samples(tokenizer, background).sample(task_named("qa1"), Cell("qa1", 20), 1)


def test_sentences_are_encoded_as_they_follow_another(tokenizer) -> None:
    encode = Encoder(tokenizer)
    text = " Mary moved to the office. Where is Mary?"
    parts = encode(" Mary moved to the office.") + encode(" Where is Mary?")
    assert parts == tokenizer(text).input_ids

    class Joins:
        def __call__(self, text: str, add_special_tokens: bool):
            return type("Encoding", (), {"input_ids": [len(text)]})

    with pytest.raises(ValueError, match="The tokenizer joins ' x' with the full stop before it"):
        Encoder(Joins())(" x")


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" bathroom", True),
        (" The bathroom.", True),
        ("BATHROOM\n", True),
        (" bathroom. It was the kitchen before.", True),
        (" bathroom or kitchen", False),
        (" kitchen", False),
        ("", False),
        (" office bathroom", True),
        (" It is not before the office but in the bathroom<example> kitchen", True),
    ],
)
def test_scoring_is_babilongs(output: str, right: bool) -> None:
    question = Question("Where was the milk before the office?", "bathroom", "milk", (0,))
    assert is_right(task_named("qa3"), question, output) is right


def test_symbols_are_the_first_word_of_an_answer() -> None:
    question = Question("a?", "a", "a", (0,))
    for output, right in ((" a", True), (" a. b: c.", True), (" b", False), ("", False), (" ab", False)):
        assert is_right(task_named("rewrite"), question, output) is right
