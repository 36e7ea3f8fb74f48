"""Sentences with names of the tasks in them: of the books but for a word or two, as many as asked for, and no fact."""

from __future__ import annotations

from random import Random

import pytest
from transformers import AutoTokenizer

from examples.train.mentions import Mention, Mentions
from examples.train.recipe import Level, Stage
from examples.train.streams import Streams
from tests.support.tiny_recipe import STAGE
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


def test_where_the_names_stand_is_known(tokenizer, text) -> None:
    text = Background.of_texts([TEXT.replace("So they", "So he")], tokenizer)
    for mention in Mentions(text, tokenizer).draw(["Mary", "garden"], 50, 10**6, Random(0), paired=0.5):
        sentence = tokenizer.decode(mention.ids)
        assert ("Mary" in sentence) == (mention.person is not None)
        assert ("garden" in sentence) == (mention.thing is not None)
        if mention.person is not None:
            assert tokenizer.decode(mention.ids[: mention.person]).endswith(" Mary")
        if mention.thing is not None:
            assert tokenizer.decode(mention.ids[mention.thing :]).startswith(" garden")


def test_it_looks_like_a_cut_fact_behind_a_person_and_before_a_thing() -> None:
    random, ids = Random(0), list(range(10))

    def breaks(person: int | None, thing: int | None) -> set[int | None]:
        return {Mention(0.0, ids, person, thing).like_cut(random) for _ in range(100)}

    assert breaks(2, None) == {2, 3, 4, 5}
    assert breaks(8, None) == {8, 9}
    assert breaks(None, 7) == {7}
    assert breaks(2, 7) == {2, 3, 4, 5, 7}
    assert breaks(None, None) == {None}


def test_a_share_of_the_mentions_is_broken_by_a_boundary(tokenizer, text) -> None:
    level, S = Level(segments=8, facts=(0.25, 0.25), questions=(0, 0), last=1), 200
    names = task_named("qa1").topics
    ended = tuple(f" {place} by night" for place in task_named("qa1").labels)

    def broken(share: float) -> tuple[int, int]:
        stage = Stage(**STAGE | {"segment_size": S, "mentions": 20.0, "broken": share, "cut": 0.0})
        streams = Streams(tokenizer, text, [], "train")
        drawn = [streams.draw(Random(seed), stage, level, False).ids for seed in range(10)]
        boundaries = [(ids, at) for ids in drawn for at in range(S, 8 * S, S)]
        persons = sum(any(name in tokenizer.decode(ids[at - 7 : at]) for name in names) for ids, at in boundaries)
        things = sum(tokenizer.decode(ids[at : at + 10]).startswith(ended) for ids, at in boundaries)
        return persons, things

    # 70 boundaries, and three mentions of a thing and two of a person for each
    (few_persons, few_things), (persons, things) = broken(0.0), broken(1.0)
    assert few_things <= 3
    assert persons - few_persons >= 15
    assert things - few_things >= 30


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
