"""Streams: what is asked can be answered from what was told, and every number about it is right."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.train.fresh import train_tokenizer
from examples.train.recipe import Level
from examples.train.streams import NONE, Streams, classes
from tests.support.solver import solve
from tests.support.tiny_recipe import stage
from vllm_armt.babilong import TASKS, Background, split_of
from vllm_armt.babilong.episodes import Fact

LEVELS = st.builds(
    Level,
    segments=st.sampled_from([1, 2, 4, 9]),
    facts=st.tuples(st.floats(0.1, 1), st.floats(1, 4)),
    questions=st.tuples(st.floats(0, 0.5), st.floats(0.5, 3)),
    last=st.integers(1, 6),
)
SENTENCE = re.compile(
    r"(?:Mary|John|Sandra|Daniel|Bill|Fred|Jeff) [a-z]+(?: [a-z]+)* the \w+(?: there| to \w+)?\."
    r"|The \w+ is (?:north|south|east|west) of the \w+\.|[a-p](?: [a-p]){2}: [a-p]\.|\b[a-p]: [a-p]\."
)

DROPS = re.compile("discarded|dropped|left|put down")


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(list(TASKS)), level=LEVELS, seed=st.integers(0, 10**6), hold=st.booleans())
def test_every_answer_follows_from_the_facts_before_it(tokenizer, background, name, level, seed, hold) -> None:
    streams = Streams(tokenizer, background, [name], "train")
    drawn = streams.draw(Random(seed), stage(tasks={name: 1.0}, segment_size=64), level, hold)
    T = 64 * level.segments
    assert len(drawn.ids) == T
    asked = np.flatnonzero(drawn.distances != NONE)
    assert len(asked)
    for position in asked:
        text = tokenizer.decode(drawn.ids[: position + 1])
        facts = SENTENCE.findall(text)
        question = re.search(r"(?:Wh\w+ [^.!?]*|\b(?:[a-p] )*[a-p])\?$", text)
        assert question, text[-80:]
        answer = solve(facts, question[0])
        assert tokenizer.decode(drawn.answers[position]).strip() == answer, text[-400:]
    # the last question is followed by its answer, and that by the end of the text
    last = int(asked[-1])
    assert drawn.ids[last + 1] == drawn.answers[last]
    assert drawn.answers[last + 1] == tokenizer.eos_token_id
    assert np.count_nonzero(drawn.answers != NONE) == len(asked) + 1
    if name in ("qa1", "qa2", "qa3", "qa4"):
        # no sentence begins with a place
        assert all(drawn.ids[position + 1] != drawn.answers[position] for position in asked[:-1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_distances_topics_and_what_is_told_are_those_of_the_text(tokenizer, background, seed: int) -> None:
    topics = classes(["qa1"])["topics"]
    streams = Streams(tokenizer, background, ["qa1"], "train")
    level = Level(segments=8, facts=(0.5, 1), questions=(0.5, 1), last=3)
    drawn = streams.draw(Random(seed), stage(segment_size=32, cut=0.5), level, False)
    beyond = np.cumsum([len(tokenizer.decode(token)) for token in drawn.ids])

    def segment(character: int) -> int:
        return int(np.searchsorted(beyond, character, side="right")) // 32

    text = tokenizer.decode(drawn.ids)
    for position in np.flatnonzero(drawn.distances != NONE):
        person = re.search(r"(\w+)\?$", text[: beyond[position]])
        assert person
        moves = [fact for fact in SENTENCE.finditer(text[: beyond[position]]) if fact[0].startswith(person[1])]
        # a sentence begins with the space before it
        first = segment(moves[-1].start() - 1)
        assert position // 32 - first == drawn.distances[position]
        assert drawn.cuts[position] == (first != segment(moves[-1].end() - 1))
    facts = [
        range(int(np.searchsorted(beyond, fact.start(), side="right")), int(np.searchsorted(beyond, fact.end())) + 1)
        for fact in SENTENCE.finditer(text)
    ]
    assert np.flatnonzero(drawn.told).tolist() == [token for fact in facts for token in fact]
    for position in np.flatnonzero(drawn.topics != NONE):
        sentence = re.search(r"[^.?!]*\??$", text[: beyond[position]])
        assert sentence
        assert topics[drawn.topics[position]] in sentence[0]
    # of the facts that are cut before their last word
    named = [fact[0].split()[0] for fact in SENTENCE.finditer(text)]
    ends = {fact[-1] - 1: name for name, fact in zip(named, facts, strict=True) if fact[0] // 32 < (fact[-1] - 1) // 32}
    assert {int(at): topics[drawn.begun[at]] for at in np.flatnonzero(drawn.begun != NONE)} == ends


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_to_be_inferred_follows_from_the_text_so_far(tokenizer, background, seed: int) -> None:
    names = classes(["qa2"])["inferences"]
    streams = Streams(tokenizer, background, ["qa2"], "train")
    level = Level(segments=4, facts=(2, 3), questions=(0.5, 1), last=3)
    drawn = streams.draw(Random(seed), stage(tasks={"qa2": 1.0}, segment_size=64, cut=0.5), level, False)
    asked = np.flatnonzero(drawn.inferences != NONE)
    assert len(asked)
    for position in asked:
        text = tokenizer.decode(drawn.ids[: position + 1])
        facts, inferred = SENTENCE.findall(text + "."), names[drawn.inferences[position]]
        if text.endswith("?"):
            thing = text.split()[-1].rstrip("?")
            handlings = [fact for fact in facts if f"the {thing}" in fact]
            assert handlings[-1].startswith(inferred) or (inferred == "nobody" and DROPS.search(handlings[-1]))
        else:
            assert solve(facts[:-1], f"Where is {facts[-1].split()[0]}?") == inferred


def test_questions_that_a_later_fact_seems_to_answer_otherwise_are_asked_as_often_as_wanted(tokenizer) -> None:
    streams = Streams(tokenizer, None, ["qa2"], "train")
    level = Level(segments=1, facts=(12, 12), questions=(0, 0), last=1)

    def lured(share: float) -> float:
        found = 0
        for seed in range(150):
            drawn = streams.draw(Random(seed), stage(tasks={"qa2": 1.0}, segment_size=256, lured=share), level, False)
            text = tokenizer.decode(drawn.ids)
            facts, question = SENTENCE.findall(text), re.search(r"Where is the (\w+)\?", text)
            assert question
            handled = max(i for i, fact in enumerate(facts) if f"the {question[1]}" in fact)
            person = facts[handled].split()[0]
            moved = any(fact.startswith(person) and " to the " in fact for fact in facts[handled + 1 :])
            found += moved and bool(DROPS.search(facts[handled]))
        return found / 150

    few, many = lured(0.0), lured(1.0)
    assert few > 0
    # in the other stories there is none to ask
    assert many > 1.7 * few


def test_a_stream_that_holds_has_its_facts_in_the_first_quarter(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, [], "train")
    level = Level(segments=16, facts=(0.5, 0.5), questions=(0, 0), last=2)
    for seed in range(20):
        drawn = streams.draw(Random(seed), stage(segment_size=32, cut=0.0), level, True)
        assert SENTENCE.findall(tokenizer.decode(drawn.ids[200:])) == []


def test_facts_are_cut_as_often_as_asked_for(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    level = Level(segments=6, facts=(0.2, 0.2), questions=(0, 0), last=1)

    def cut(share: float) -> int:
        found = 0
        for seed in range(60):
            drawn = streams.draw(Random(seed), stage(segment_size=64, cut=share), level, False)
            whole = tokenizer.decode(drawn.ids)
            parts = [tokenizer.decode(drawn.ids[i : i + 64]) for i in range(0, len(drawn.ids), 64)]
            found += len(SENTENCE.findall(whole)) - sum(len(SENTENCE.findall(part)) for part in parts) > 0
        return found

    assert cut(1.0) >= 50
    assert cut(0.0) <= 20


def test_other_facts_of_such_streams_are_cut_too(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    level, S = Level(segments=8, facts=(0.5, 1), questions=(0, 0), last=1), 64

    def cut(share: float) -> int:
        """Boundaries that run through a fact, of 50 streams."""
        total = 0
        for seed in range(50):
            told = streams.draw(Random(seed), stage(segment_size=S, cut=1.0, also_cut=share), level, False).told
            total += sum(bool(told[begin - 1] and told[begin]) for begin in range(S, len(told), S))
        return total

    assert cut(0.0) <= 80
    assert cut(1.0) >= 130


@pytest.mark.parametrize("cut", [0.0, 1.0])
def test_an_answer_runs_over_into_the_next_segment_as_often_as_asked_for(tokenizer, background, cut: float) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    S = 64

    def run_over(share: float, segments: int) -> int:
        """Questions that end a segment, of 40 streams' last."""
        level = Level(segments=segments, facts=(0.5, 1), questions=(0.5, 1), last=2)
        found = 0
        for seed in range(40):
            drawn = streams.draw(Random(seed), stage(segment_size=S, cut=cut, overrun=share), level, False)
            last = int(np.flatnonzero(drawn.distances != NONE)[-1])
            # it is followed by its answer, and that by the end of the text, wherever it stands
            assert tokenizer.decode(drawn.ids[: last + 1]).endswith("?")
            assert drawn.ids[last + 1] == drawn.answers[last]
            assert drawn.answers[last + 1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in drawn.ids
            found += (last + 1) % S == 0
        return found

    assert run_over(0.0, 4) <= 3
    assert 10 <= run_over(0.5, 4) <= 30
    assert run_over(1.0, 4) == 40
    assert run_over(1.0, 1) == 0


def test_a_longer_answer_is_parted_anywhere(books) -> None:
    tokenizer = train_tokenizer(300, books)
    background = Background.of_directory(books / "train", tokenizer)
    streams = Streams(tokenizer, background, ["qa1"], "train")
    level, S = Level(segments=4, facts=(0.5, 1), questions=(0, 0), last=1), 64
    parts = set()
    for seed in range(150):
        drawn = streams.draw(Random(seed), stage(segment_size=S, overrun=1.0), level, False)
        begin, end = np.flatnonzero(drawn.answers != NONE)[[0, -1]]
        shown = end - begin
        assert drawn.ids[begin + 1 : end + 1].tolist() == drawn.answers[begin:end].tolist()
        # how much of the answer, of how much, stands before the boundary
        parts.add((int(-(begin + 1) % S), int(shown)))
    assert len({shown for _, shown in parts}) > 1
    assert parts == {(before, shown) for _, shown in parts for before in range(shown)}


def test_streams_belong_to_their_split(tokenizer, background) -> None:
    level = Level(segments=4, facts=(1, 1), questions=(0, 0), last=1)
    for split in ("train", "validation"):
        streams = Streams(tokenizer, background, [], split)
        for seed in range(20):
            text = tokenizer.decode(streams.draw(Random(seed), stage(segment_size=64), level, False).ids)
            assert split_of([Fact(fact, "") for fact in SENTENCE.findall(text)]) == split


def test_without_text_pairs_fill_their_segments(tokenizer) -> None:
    streams = Streams(tokenizer, None, ["rewrite"], "train")
    level = Level(segments=12, facts=(0.75, 0.75), questions=(0, 0), last=2)
    drawn = streams.draw(Random(0), stage(tasks={"rewrite": 1.0}, segment_size=4, cut=0.0), level, False)
    text = tokenizer.decode(drawn.ids)
    assert re.match(r"( [a-p]: [a-p]\.){9,10} [a-p]\?", text)
    assert drawn.ids[-1] == tokenizer.eos_token_id
    assert all(tokenizer.decode(drawn.ids[i]) == "." for i in range(3, 36, 4))


def test_a_stream_too_short_for_anything_is_refused(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, [], "train")
    level = Level(segments=1, facts=(1, 1), questions=(0, 0), last=1)
    with pytest.raises(
        ValueError, match="8 tokens are too few for the facts and a question of qa1: lengthen the stream"
    ):
        streams.draw(Random(0), stage(segment_size=8), level, False)
