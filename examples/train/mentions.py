"""Sentences of books with a name of the tasks in them, which tell no fact: what a memory must learn not to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Mention:
    """A sentence with a name of the tasks in it.

    Attributes:
        depth: where in a stream, from 0 to 1.
        ids: its tokens.
        thing: how many of them stand before the name of a place, a thing or a direction; None where there is none.
    """

    depth: float
    ids: list[int]
    thing: int | None


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

    def draw(self, names: Sequence[str], count: int, room: int, random: Random, paired: float = 0.0) -> list[Mention]:
        """`count` sentences, or as many as fill half of `room` tokens.

        `names` are those of persons, with a capital, and all others; each comes as often. A share `paired` of the
        sentences gets one of either.
        """
        drawn: list[Mention] = []
        persons = [name for name in names if name[0].isupper()]
        things = [name for name in names if not name[0].isupper()]
        for _ in range(count):
            name = random.choice(names)
            person, thing = (name, None) if name[0].isupper() else (None, name)
            sentences = self._with_person if person else self._with_thing
            if persons and things and random.random() < paired:
                person, thing = person or random.choice(persons), thing or random.choice(things)
            if not sentences:
                continue
            sentence, before = random.choice(sentences), None
            if person:
                sentence, _ = _named(person, PERSON, sentence, random)
            if thing:
                sentence, before = _named(thing, THING, sentence, random)
            ids = self._encode(sentence)
            room -= 2 * len(ids)
            if room < 0:
                break
            drawn.append(Mention(random.random(), ids, None if before is None else len(self._encode(before.rstrip()))))
        return drawn

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

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


def _named(name: str, where: re.Pattern[str], sentence: str, random: Random) -> tuple[str, str | None]:
    """The sentence with a name in the place of one of its words, and what stands before; as it is if there is none."""
    places = list(where.finditer(sentence))
    if not places:
        return sentence, None
    place = random.choice(places)
    before = sentence[: place.start()]
    return before + name + sentence[place.end() :], before
