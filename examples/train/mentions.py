"""Sentences of books with a name of the tasks in them, which tell no fact: what a memory must learn not to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random

from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong import Background, Encoder, Split, distractor, task_named
from vllm_armt.babilong.forms import FACTS, INLINE

PERSON = re.compile(r"\b[Hh]e\b|\b[Ss]he\b|(?<=[a-z,;] )[A-Z][a-z]+")
"""Where a person's name may stand: pronouns, and capitals that begin no sentence."""

THING = re.compile(r"(?<=\bthe )[a-z]+")
"""Where a place, a thing or a direction may stand."""

BEHIND = 4
"""A boundary that cuts a fact before its place has none to three tokens of it behind the person's name."""

LONGEST = 300
"""Characters of a sentence; verses in one breath would fill whole segments."""


@dataclass(frozen=True)
class Mention:
    """A sentence with a name of the tasks in it.

    Attributes:
        depth: where in a stream, from 0 to 1.
        ids: its tokens.
        person: how many of them end with a person's name; None where there is none.
        thing: how many of them stand before the name of a place, a thing or a direction; None where there is none.
    """

    depth: float
    ids: list[int]
    person: int | None
    thing: int | None

    def like_cut(self, random: Random) -> int | None:
        """How many of its tokens may stand before a segment boundary for it to look like a fact that is cut there: up
        to a person's name, or a few more, or all that stand before the thing's. None where there is neither."""
        begun = [] if self.person is None else [min(self.person + random.randrange(BEHIND), len(self.ids) - 1)]
        ended = [] if self.thing is None else [self.thing]
        return random.choice(begun + ended) if begun or ended else None


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
        self.encode = Encoder(tokenizer)

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
            sentence = random.choice(sentences)
            for put, where in ((person, PERSON), (thing, THING)):
                if put:
                    sentence = _named(put, where, sentence, random)
            mention = self._mention(sentence, person, thing, random)
            room -= 2 * len(mention.ids)
            if room < 0:
                break
            drawn.append(mention)
        return drawn

    def distract(self, names: Sequence[str], count: int, random: Random, split: Split, forms: float) -> list[Mention]:
        """`count` sentences that were made to name a person and a place without telling a move; see `distractors`.

        Args:
            names: as in `draw`.
            count: how many.
            random: for all draws.
            split: whose templates.
            forms: share of those that stand in another form than between two sentences.
        """
        persons = [name for name in names if name[0].isupper()] or list(task_named("qa1").topics)
        things = [name for name in names if not name[0].isupper()]
        drawn = []
        for _ in range(count):
            form = random.choice(list(FACTS.values())) if random.random() < forms else INLINE
            sentence = distractor(split, random, persons, things)
            encoded = self.encode.sentence(sentence, form)
            found = {name: at.start() for name in (*persons, *things) if (at := re.search(rf"\b{name}\b", sentence))}
            person = min((at + len(name) for name, at in found.items() if name in persons), default=None)
            thing = min((at for name, at in found.items() if name in things), default=None)
            drawn.append(
                Mention(
                    random.random(),
                    encoded.ids,
                    None if person is None else self.encode.within(encoded, person - 1) + 1,
                    None if thing is None else self.encode.within(encoded, thing),
                )
            )
        return drawn

    def _mention(self, sentence: str, person: str | None, thing: str | None, random: Random) -> Mention:
        encoding = self.tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)

        def before(character: int) -> int:
            return sum(end <= character for _, end in encoding.offset_mapping)

        # where two names were asked for, there may have been no place for one
        named, placed = (re.search(rf"\b{name}\b", sentence) if name else None for name in (person, thing))
        return Mention(
            random.random(), encoding.input_ids, named and before(named.end()), placed and before(placed.start())
        )

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


def _named(name: str, where: re.Pattern[str], sentence: str, random: Random) -> str:
    """The sentence with a name in the place of one of its words; as it is if there is none."""
    places = list(where.finditer(sentence))
    if not places:
        return sentence
    place = random.choice(places)
    return sentence[: place.start()] + name + sentence[place.end() :]
