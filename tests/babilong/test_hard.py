"""Texts as people write them: forms, sentences that only look like facts, other words; each part has its own."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from tests.support.solver import solve
from vllm_armt.babilong import KINDS, SPLITS, Cell, Samples, distractor, reworded, task_named
from vllm_armt.babilong.encoder import Encoder
from vllm_armt.babilong.forms import FACTS, QUESTIONS, Form
from vllm_armt.babilong.hard import FILE, kinds, kinds_of
from vllm_armt.babilong.stories import story
from vllm_armt.babilong.wordings import MORE

QA1 = task_named("qa1")
PERSONS, PLACES = QA1.topics, QA1.labels
MOVE = re.compile(rf"(?:{'|'.join(PERSONS)}) (?:moved|went|went back|journeyed|travelled) to the \w+\.")


def drawn(split, kind: str, count: int = 300) -> set[str]:
    return {distractor(split, Random(i), PERSONS, PLACES, (kind,)) for i in range(count)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_fact_names_a_person_and_a_place_and_is_none(kind: str) -> None:
    for split in SPLITS:
        for sentence in drawn(split, kind):
            assert any(person in sentence for person in PERSONS)
            assert sum(place in sentence for place in PLACES) >= 1
            assert not MOVE.fullmatch(sentence)
            assert not set(sentence) & set("[]{}|")
            assert "  " not in sentence


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_has_a_sentence_of_another(kind: str) -> None:
    parts = [drawn(split, kind, 1500) for split in SPLITS]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    # what is trained on is more than can be learnt by heart
    assert len(parts[0]) > 200


def test_who_it_is_about_can_be_chosen() -> None:
    for seed in range(100):
        sentence = distractor("test", Random(seed), PERSONS, PLACES, ("negation",), about="Mary")
        assert sentence.startswith("Mary ")


def test_facts_in_other_words_tell_the_same() -> None:
    for i, split in enumerate(SPLITS):
        for seed in range(50):
            told = reworded("Mary went back to the garden.", split, Random(seed))
            assert re.fullmatch(r"Mary .* the garden\.", told)
            assert split == "train" or not MOVE.fullmatch(told)
            others = {verb for parts in MORE.values() for verb in parts[SPLITS[i - 1]] if "[" not in verb}
            assert not any(told == f"Mary {verb} the garden." for verb in others)
    assert reworded("Mary took the milk there.", "test", Random(0)).endswith("the milk there.")
    assert reworded("The office is north of the garden.", "train", Random(0)) == "The office is north of the garden."


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("fixture", ["tokenizer", "trailing"])
def test_a_form_is_put_around_a_sentence_and_its_last_word_is_found(fixture: str, name: str, request) -> None:
    words, form = request.getfixturevalue(fixture), FACTS[name]
    encode = Encoder(words)
    text = "Mary went to the garden."
    piece = encode.sentence(text, form)
    assert words.decode(piece.ids).strip(" ") == f"{form.before}{text}{form.after}".strip(" ")
    assert words.decode(piece.ids[: encode.within(piece, len(text) - 2) + 1]).endswith("garden")
    assert words.decode(piece.ids[: encode.within(piece, 0) + 1]).rstrip().endswith("Mary")


def test_where_spaces_trail_a_name_is_one_token_whatever_stands_before_it(trailing) -> None:
    encode = Encoder(trailing)
    assert encode.trails
    (mary,) = trailing("Mary ").input_ids
    for form in FACTS.values():
        piece = encode.sentence("Mary went to the garden.", form)
        assert piece.ids[encode.within(piece, 0)] == mary


def test_questions_end_with_their_form(trailing) -> None:
    encode = Encoder(trailing)
    for form in QUESTIONS.values():
        asked = encode.sentence("Where is Mary?", form, asks=True)
        assert trailing.decode(asked.ids) == f"{form.before}Where is Mary?{form.after}"


@pytest.mark.parametrize("length", [0, 1500])
def test_hard_samples_are_plain_ones_but_for_their_kind(tokenizer, background, length: int) -> None:
    samples = Samples(tokenizer, background)
    plain = samples.sample(QA1, Cell("qa1", length), 5)
    for name, kind in kinds().items():
        sample = samples.sample(QA1, Cell("qa1", length, None, name), 5)
        text = tokenizer.decode(sample.ids)
        assert (len(sample.ids) == length) == bool(length)
        assert all(fact.text in text for fact in sample.story.facts)
        if kind.untold:
            assert sample.story.question.answer == "unknown"
            assert all(sample.story.question.about not in fact.text for fact in sample.story.facts)
        elif kind.facts is None:
            assert sample.story.question == plain.story.question
        if not kind.untold and not kind.reworded:
            told = [fact.text for fact in sample.story.facts]
            assert solve(told, sample.story.question.text) == sample.story.question.answer
        if kind.then:
            behind = text[text.rindex(sample.story.facts[-1].text) + len(sample.story.facts[-1].text) :]
            assert sample.story.question.about in behind.removesuffix(sample.story.question.text)
        if kind.opens:
            assert text.startswith(sample.story.facts[0].text)


def test_every_kind_of_the_file_is_known_and_none_is_twice() -> None:
    assert kinds().keys() == json.loads(FILE.read_text()).keys()
    assert len(set(kinds().values())) == len(kinds())
    assert {kind.then for kind in kinds().values()} - {None} == set(KINDS)
    assert all(isinstance(form, Form) for form in (*FACTS.values(), *QUESTIONS.values()))


@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_a_task_has_stories_of_every_kind_that_is_asked_of_it(name: str) -> None:
    task = task_named(name)
    for kind in kinds_of(task):
        story(task, "test", 0, 0, kinds()[kind].facts)
    assert set(kinds()) - set(kinds_of(task)) == ({"one fact", "forty facts"} if name == "qa4" else set())
