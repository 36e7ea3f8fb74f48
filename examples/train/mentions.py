"""Sentences of books with a name of the tasks in them, which tell no fact: what a memory must learn not to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from random import Random

from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong import Background

PERSON = re.compile(r"\b[Hh]e\b|\b[Ss]he\b|(?<=[a-z,;] )[A-Z][a-z]+")
"""Where a person's name may stand: pronouns, and capitals that begin no sentence."""

THING = re.compile(r"(?<=\bthe )[a-z]+")
"""Where a place, a thing or a direction may stand."""

LONGEST = 300
"""Characters of a sentence; verses in one breath would fill whole segments."""


class Mentions:
    """Draws sentences of a text in which a word, or two, have given way to names of the tasks.

    Books hold few sentences with such a name (one of the four persons of qa1 not once in two million tokens), and of
    those that they hold a model would learn the words by heart.

    Args:
        background: whose sentences.
        tokenizer: of its tokens.
    """

    def __init__(self, background: Background, tokenizer: PreTrainedTokenizerBase) -> None:
        self.background = background
        self.tokenizer = tokenizer

    def draw(
        self, names: Sequence[str], count: int, room: int, random: Random, paired: float = 0.0
    ) -> list[tuple[float, list[int]]]:
        """Depths and tokens of `count` sentences, or of as many as fill half of `room` tokens.

        `names` are those of persons, with a capital, and all others; each comes as often. A share `paired` of the
        sentences gets one of either.
        """
        drawn: list[tuple[float, list[int]]] = []
        persons = [name for name in names if name[0].isupper()]
        things = [name for name in names if not name[0].isupper()]
        for _ in range(count):
            first, second = random.choice(names), None
            if persons and things and random.random() < paired:
                second = random.choice(things if first[0].isupper() else persons)
            sentences = self._with_person if first[0].isupper() else self._with_thing
            if not sentences:
                continue
            sentence = _named(first, random.choice(sentences), random)
            if second:
                sentence = _named(second, sentence, random)
            ids = self.tokenizer(sentence, add_special_tokens=False).input_ids
            room -= 2 * len(ids)
            if room < 0:
                break
            drawn.append((random.random(), ids))
        return drawn

    @cached_property
    def _with_person(self) -> list[str]:
        return [sentence for sentence in self._sentences if PERSON.search(sentence)]

    @cached_property
    def _with_thing(self) -> list[str]:
        return [sentence for sentence in self._sentences if THING.search(sentence)]

    @cached_property
    def _sentences(self) -> list[str]:
        ids, ends = self.background.ids, self.background.ends
        rows = [ids[begin:end].tolist() for begin, end in pairwise(ends)]
        return [sentence for sentence in self.tokenizer.batch_decode(rows) if len(sentence) <= LONGEST]


def _named(name: str, sentence: str, random: Random) -> str:
    """The sentence with a name in the place of one of its words, if there is one that the name can stand for."""
    places = list((PERSON if name[0].isupper() else THING).finditer(sentence))
    if not places:
        return sentence
    place = random.choice(places)
    return sentence[: place.start()] + name + sentence[place.end() :]
