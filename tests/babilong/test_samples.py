"""Samples: what is said of a prompt is what its tokens say."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.texts import sentences
from vllm_armt.babilong import (
    MENTIONS,
    TASKS,
    Background,
    Cell,
    Encoder,
    Question,
    Samples,
    Whitespace,
    in_chat,
    is_right,
    prompts,
    task_named,
)

names = st.sampled_from(list(TASKS))


@pytest.fixture(scope="module")
def trailing_background(trailing) -> Background:
    return Background.of_texts([sentences(Random(i), 150) for i in range(3)], trailing)


@settings(max_examples=100, deadline=None)
@given(
    name=names,
    length=st.sampled_from([0, 3000, 6000]),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 99),
    spaces=st.sampled_from(["leading", "trailing", "collapsed"]),
)
def test_positions_hold_after_tokenisation(
    tokenizer, trailing, background, trailing_background, name, length, index, seed, spaces
) -> None:
    words, text = (trailing, trailing_background) if spaces == "trailing" else (tokenizer, background)
    whitespace: Whitespace = "collapsed" if spaces == "collapsed" else "as-is"
    samples = Samples(words, text, seed=seed, segment_size=64, cut=0.3, mentions=2, whitespace=whitespace)
    sample = samples.sample(task_named(name), Cell(name, length), index)
    story = sample.story
    if length:
        assert len(sample.ids) == length
    before = "" if spaces == "trailing" else " "
    opens = [length == 0 and i == 0 and whitespace == "as-is" for i in range(len(story.facts))]
    sizes = [len(samples.encode.sentence(fact.text, opens=o).ids) for fact, o in zip(story.facts, opens, strict=True)]
    for fact, start, size, is_first in zip(story.facts, sample.starts, sizes, opens, strict=True):
        told = words.decode(sample.ids[start : start + size])
        assert told.rstrip() == ("" if is_first else before) + fact.text
    text = words.decode(sample.ids)
    # with trailing spaces the text before it may have been cut short by a cut fact
    assert text.endswith(story.question.text if spaces == "trailing" else f" {story.question.text}")
    if length == 0:
        assert text.startswith((" " if whitespace == "collapsed" else "") + story.facts[0].text)
        assert "  " not in text
    assert sample.supports == tuple(sample.starts[i] for i in story.question.supports)
    assert sample.depth == sample.supports[0] / len(sample.ids)
    spans = [(sample.starts[i], sizes[i]) for i in story.question.supports]
    assert sample.is_cut == any(start // 64 != (start + size - 1) // 64 for start, size in spans)
    again = samples.sample(task_named(name), Cell(name, length), index)
    assert (again.ids == sample.ids).all()


def test_the_first_needed_fact_goes_through_all_depths(tokenizer, background) -> None:
    samples = Samples(tokenizer, background)
    task, cell = task_named("qa2"), Cell("qa2", 20_000)
    for index in range(20):
        depth = samples.sample(task, cell, index).depth
        assert depth is not None
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


def test_mentions_are_of_the_kinds_that_are_asked_for(tokenizer, background) -> None:
    def text(*kinds: str) -> str:
        samples = Samples(tokenizer, background, mentions=10, mention_kinds=kinds)
        return tokenizer.decode(samples.sample(task_named("qa1"), Cell("qa1", 6000), 0).ids)

    assert len(re.findall("possesses a map of the|'s work|has two windows|is owned by", text("possession"))) >= 20
    every = text(*MENTIONS)
    assert len(re.findall("longed for|were in the|could go to|going to paint", every)) >= 2
    assert len(re.findall("did not travel|has not gone|avoided|wasn't in", every)) >= 2


def test_what_stands_before_and_behind_a_text_is_the_prompts(tokenizer, background) -> None:
    own = prompts()
    samples = Samples(tokenizer, background, prompt=own.__getitem__)
    sample = samples.sample(task_named("qa5"), Cell("qa5", 3000), 0)
    text = tokenizer.decode(sample.ids)
    assert text.startswith("Below is a text in which sentences about people who hand things to each other")
    assert text.endswith(f"\n</context>\n\nQuestion: {sample.story.question.text}")
    assert text.count("<example>") == 2
    assert len(sample.ids) == 3000
    chat = Samples(tokenizer, background, prompt=lambda task: in_chat(own[task], tokenizer))
    assert tokenizer.decode(chat.sample(task_named("qa5"), Cell("qa5", 3000), 0).ids).endswith(f"{text[-30:]}\n")


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
    with pytest.raises(ValueError, match="15 tokens were asked for"):
        Samples(tokenizer, background).sample(task_named("qa1"), Cell("qa1", 15), 1)


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
