"""Sentences with names of the tasks in them: of the books but for a word or two, as many as asked for, and no fact."""

from __future__ import annotations

from random import Random

import pytest
from transformers import AutoTokenizer

from examples.train.mentions import Mentions
from examples.train.recipe import Level, Stage
from examples.train.streams import Streams
from tests.examples.train.conftest import STAGE
from vllm_armt.babilong import Background, task_named

TEXT = "It rained. Then came Moses, and he spake. So they went to the camp by night. Nothing else. The end is near."


@pytest.fixture(scope="session")
def tokenizer(start):
    return AutoTokenizer.from_pretrained(start)


@pytest.fixture(scope="session")
def text(tokenizer) -> Background:
    return Background.of_texts([TEXT], tokenizer)


def test_one_word_gives_way_to_a_name(tokenizer, text) -> None:
    drawn = Mentions(text, tokenizer).draw(["Mary"], 60, 10**6, Random(0))
    assert len(drawn) == 60
    assert all(0 <= mention.depth < 1 for mention in drawn)
    assert {tokenizer.decode(mention.ids) for mention in drawn} == {
        " Then came Mary, and he spake.",
        " Then came Moses, and Mary spake.",
    }


def test_some_sentences_have_a_person_and_a_thing(tokenizer, text) -> None:
    text = Background.of_texts([TEXT.replace("So they", "So he")], tokenizer)
    mentions = Mentions(text, tokenizer).draw(["Mary", "garden"], 400, 10**6, Random(0), paired=0.25)
    drawn = [tokenizer.decode(mention.ids) for mention in mentions]
    both = " So Mary went to the garden by night."
    assert 20 < drawn.count(both) < 100
    assert {sentence for sentence in drawn if "Mary" not in sentence} == {" So he went to the garden by night."}


def test_where_the_thing_stands_is_known(tokenizer, text) -> None:
    text = Background.of_texts([TEXT.replace("So they", "So he")], tokenizer)
    for mention in Mentions(text, tokenizer).draw(["Mary", "garden"], 50, 10**6, Random(0), paired=0.5):
        sentence = tokenizer.decode(mention.ids)
        assert ("garden" in sentence) == (mention.thing is not None)
        if mention.thing is not None:
            assert tokenizer.decode(mention.ids[mention.thing :]).startswith(" garden")


def test_a_share_of_the_things_stands_at_the_beginning_of_a_segment(tokenizer, text) -> None:
    level, S = Level(segments=8, facts=(0.25, 0.25), questions=(0, 0), last=1), 200
    places = tuple(f" {place} by night" for place in task_named("qa1").labels)

    def opened(share: float) -> int:
        stage = Stage(**STAGE | {"segment_size": S, "mentions": 20.0, "broken": share, "cut": 0.0})
        streams = Streams(tokenizer, text, [], "train")
        drawn = [streams.draw(Random(seed), stage, level, False) for seed in range(10)]
        begun = [tokenizer.decode(stream.ids[begin : begin + 10]) for stream in drawn for begin in range(S, 8 * S, S)]
        return sum(words.startswith(places) for words in begun)

    assert opened(0.0) <= 3
    # 70 boundaries and three mentions of a thing for each
    assert opened(1.0) >= 50


def test_they_fill_half_of_the_room(tokenizer, text) -> None:
    drawn = Mentions(text, tokenizer).draw(["Mary"], 1000, 400, Random(0))
    assert 100 < sum(len(mention.ids) for mention in drawn) <= 200


def test_a_text_without_such_sentences_has_none(tokenizer) -> None:
    dull = Background.of_texts(["It rained. it rained."], tokenizer)
    assert Mentions(dull, tokenizer).draw(["Mary", "garden"], 10, 1000, Random(0)) == []


def test_a_stage_strews_in_as_many_as_it_says_and_facts_stay_what_they_are(tokenizer, text) -> None:
    level = Level(segments=4, facts=(0.25, 0.25), questions=(0, 0), last=1)

    def told(mentions: float) -> list[str]:
        stage = Stage(**STAGE | {"segment_size": 500, "mentions": mentions, "cut": 0.0})
        streams = Streams(tokenizer, text, [], "train")
        return [tokenizer.decode(streams.draw(Random(seed), stage, level, False).ids) for seed in range(5)]

    assert all(document.count("garden") + document.count("office") < 5 for document in told(0.0))
    for document in told(50.0):
        # 100 a document; six of qa1's ten names are places
        assert 30 < document.count("So they went to the ") - document.count("So they went to the camp") < 90
        assert len(tokenizer(document).input_ids) == pytest.approx(2000, abs=5)
