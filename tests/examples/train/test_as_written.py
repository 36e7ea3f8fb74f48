"""Streams as people write: forms, shown answers, what was never told, short texts, instructions; their tokenizer."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from examples.train.fresh import make_model
from examples.train.recipe import Fresh, Level
from examples.train.streams import NONE, Streams, instructions
from examples.train.transplant import share_vectors, take_over
from tests.support.solver import solve
from tests.support.texts import sentences
from tests.support.tiny_recipe import FRESH, stage
from vllm_armt.babilong import Background
from vllm_armt.babilong.forms import FACTS

LEVEL = Level(segments=1, facts=(3, 6), questions=(1, 2), last=2)


@pytest.fixture(scope="module")
def streams(trailing) -> Streams:
    text = Background.of_texts([sentences(Random(i), 150) for i in range(3)], trailing)
    return Streams(trailing, text, ["qa1"], "train")


def of(streams: Streams, count: int, level: Level = LEVEL, **given):
    """Streams, and of each the text up to every question with the answer that is asked for."""
    words = streams.encode.tokenizer
    for seed in range(count):
        drawn = streams.draw(Random(seed), stage(**{"segment_size": 256, "cut": 0.0} | given), level, False)
        asked = np.flatnonzero(drawn.distances != NONE)
        yield drawn, [(words.decode(drawn.ids[: at + 1]), words.decode(drawn.answers[at])) for at in asked]


def told_in(text: str) -> list[str]:
    """bAbI's facts, however they stand."""
    parts = [part.strip() for part in text.replace("?", ".").split(".")]
    facts = []
    for part in parts:
        at = max(part.rfind(name) for name in ("Mary", "John", "Sandra", "Daniel"))
        if at >= 0 and " to the " in part[at:]:
            facts.append(part[at:] + ".")
    return facts


def test_in_any_form_answers_follow_from_the_facts(streams: Streams) -> None:
    for _, asked in of(streams, 60, forms=1.0, shown=0.5):
        for text, answer in asked:
            question = text[text.rindex("Where is") : text.rindex("?") + 1]
            assert solve(told_in(text[: text.rindex("Where is")]), question) == answer, text[-300:]


def test_facts_stand_in_every_form(streams: Streams) -> None:
    words = streams.encode.tokenizer
    texts = "".join(words.decode(drawn.ids) for drawn, _ in of(streams, 120, forms=1.0))
    for form in FACTS.values():
        assert any(f"{form.before}{name} " in texts for name in ("Mary", "John", "Sandra", "Daniel")), form


def test_who_was_never_told_of_is_unknown(streams: Streams) -> None:
    found = [(text, answer) for _, asked in of(streams, 60, unknown=0.5) for text, answer in asked]
    unknown = [text for text, answer in found if answer.startswith("u")]
    assert 0.3 < len(unknown) / len(found) < 0.7
    for text in unknown:
        person = text[text.rindex("Where is ") + 9 : text.rindex("?")]
        assert not any(fact.startswith(person) for fact in told_in(text))


def test_of_nothing_nothing_is_known(streams: Streams) -> None:
    for drawn, asked in of(streams, 20, empty=1.0):
        assert asked
        assert all(answer.startswith("u") for _, answer in asked)
        assert not drawn.told.any()


def test_brief_streams_are_what_somebody_types(streams: Streams) -> None:
    words = streams.encode.tokenizer
    for drawn, asked in of(streams, 40, brief=1.0, forms=0.5):
        text = words.decode(drawn.ids)
        typed = text.rstrip()
        assert not text[:1].isspace()
        assert typed.endswith(words.eos_token)
        assert len(words(typed.replace(words.eos_token, "")).input_ids) < 200
        # behind the last answer nothing is said
        assert typed.index(words.eos_token) >= len(asked[-1][0])


def test_shown_answers_end_and_the_text_goes_on(streams: Streams) -> None:
    end = streams.end
    for drawn, asked in of(streams, 20, shown=1.0):
        assert np.count_nonzero(drawn.answers == end) == len(asked)
        assert end not in drawn.ids


def test_an_instruction_stands_before_the_text(streams: Streams) -> None:
    words = streams.encode.tokenizer
    level = Level(segments=8, facts=(0.5, 1), questions=(0, 0), last=1)
    begun = {words.decode(drawn.ids)[:9] for drawn, _ in of(streams, 20, level, instructed=1.0)}
    assert begun <= {text[:9] for text in instructions()}
    assert len(begun) >= 2


def test_made_sentences_are_strewn_in_with_where_their_names_stand(streams: Streams) -> None:
    assert streams.mentions is not None
    words = streams.encode.tokenizer
    for mention in streams.mentions.distract(["Mary", "John", "garden", "office"], 80, Random(0), "train", 0.5):
        text = words.decode(mention.ids)
        assert mention.person is not None
        assert mention.thing is not None
        assert words.decode(mention.ids[: mention.person]).rstrip().endswith(("Mary", "John")), text
        assert words.decode(mention.ids[mention.thing :]).startswith(("garden", "office")), text


def test_a_word_with_a_space_begins_near_the_word_without(trailing) -> None:
    table = torch.nn.Embedding(len(trailing), 64)
    share_vectors(table, trailing)
    (mary,), (spaced,), (other,) = (trailing(text).input_ids for text in ("Mary", "Mary ", "John "))
    alike = torch.nn.functional.cosine_similarity(table.weight[mary], table.weight[[spaced, other]])
    assert alike[0] > 0.8
    assert alike[1] < 0.5


def test_a_model_takes_over_another_ones_weights(start: Path, trailing) -> None:
    fresh = Fresh(**FRESH | {"spaces": "trailing"})
    model = make_model(fresh, trailing, 32, seed=5)
    take_over(model, trailing, start)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other, words = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    for name, tensor in other.state_dict().items():
        if tensor.shape[0] != len(words):
            assert torch.equal(model.state_dict()[name], tensor)
    ours, theirs = model.get_input_embeddings().weight, other.get_input_embeddings().weight
    (mary,) = words(" Mary").input_ids
    for text in ("Mary", "Mary "):
        assert torch.equal(ours[trailing(text).input_ids[0]], theirs[mary])
    with pytest.raises(ValueError, match="has other sizes than the recipe's `fresh`"):
        take_over(make_model(Fresh(**FRESH | {"layers": 1, "num_mem_tokens": 2}), trailing, 32, 0), trailing, start)
