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
    """Draws sentences of a text in which one word has given way to a name of the tasks.

    Books hold few sentences with such a name (one of the four persons of qa1 not once in two million tokens), and of
    those that they hold a model would learn the words by heart.

    Args:
        background: whose sentences.
        tokenizer: of its tokens.
    """

    def __init__(self, background: Background, tokenizer: PreTrainedTokenizerBase) -> None:
        self.background = background
        self.tokenizer = tokenizer

    def draw(self, names: Sequence[str], count: int, room: int, random: Random) -> list[tuple[float, list[int]]]:
        """Depths and tokens of `count` sentences, or of as many as fill half of `room` tokens.

        `names` are those of persons, with a capital, and all others; each comes as often.
        """
        drawn: list[tuple[float, list[int]]] = []
        for _ in range(count):
            name = random.choice(names)
            sentences, places = (self._with_person, PERSON) if name[0].isupper() else (self._with_thing, THING)
            if not sentences:
                continue
            sentence = random.choice(sentences)
            place = random.choice(list(places.finditer(sentence)))
            ids = self.tokenizer(sentence[: place.start()] + name + sentence[place.end() :], add_special_tokens=False)
            room -= 2 * len(ids.input_ids)
            if room < 0:
                break
            drawn.append((random.random(), ids.input_ids))
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
