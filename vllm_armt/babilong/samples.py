"""What a model is asked: a story hidden in a document, and the tokens of the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.background import Background, Tokens, Whitespace
from vllm_armt.babilong.distractors import KINDS, distractor
from vllm_armt.babilong.documents import Cut, Document, weave
from vllm_armt.babilong.encoder import Encoded, Encoder
from vllm_armt.babilong.episodes import UNKNOWN, Fact, Question
from vllm_armt.babilong.forms import FACTS, QUESTIONS
from vllm_armt.babilong.hard import PLAIN as PLAIN_KIND
from vllm_armt.babilong.hard import Kind, kinds
from vllm_armt.babilong.people import PLACES
from vllm_armt.babilong.prompts import PLAIN, Prompt, prompts
from vllm_armt.babilong.stories import Split, Story, Task, story, task_named
from vllm_armt.babilong.wordings import reworded

DEPTHS = 10
"""Equal parts of a document; the samples of a cell go through them in turn with the first supporting fact."""

ATTEMPTS = 100
"""Stories that are drawn in search of one that is short enough."""

OF_THE_TEXT = "text"
"""The kind of mentions that are sentences of the background; the others are those of `distractors`."""

MENTIONS = (OF_THE_TEXT, *KINDS)


@dataclass(frozen=True)
class Cell:
    """Samples of one kind.

    Attributes:
        task: its name.
        length: tokens of a prompt; 0 for the story alone, without background.
        facts: of a story; None for as many as the task has.
        kind: a key of `hard.json`; None for plain ones.
    """

    task: str
    length: int
    facts: int | None = None
    kind: str | None = None

    @property
    def seed(self) -> str:
        """What its draws depend on: samples of two kinds differ in what makes the kind, and in nothing else."""
        return f"Cell(task={self.task!r}, length={self.length!r}, facts={self.facts!r})"


@dataclass(frozen=True)
class Sample:
    """One prompt, and what is known of it.

    Attributes:
        cell: what it is a sample of.
        index: which one.
        story: the facts, the question and its answer.
        ids: tokens of the prompt, int32.
        starts: where each fact begins, in tokens; none where that is not known.
        is_cut: whether a segment boundary runs through a supporting fact.
        last: the last answer that its facts name, which is the baseline; None if they name none.
    """

    cell: Cell
    index: int
    story: Story
    ids: Tokens
    starts: tuple[int, ...]
    is_cut: bool
    last: str | None

    @property
    def supports(self) -> tuple[int, ...]:
        """Where the supporting facts begin, in tokens."""
        return tuple(self.starts[fact] for fact in self.story.question.supports) if self.starts else ()

    @property
    def depth(self) -> float | None:
        """Where the first supporting fact begins, as a share of the prompt; None where that is not known."""
        return self.supports[0] / len(self.ids) if self.supports else None


class Source(Protocol):
    """Where samples come from."""

    def sample(self, task: Task, cell: Cell, index: int) -> Sample:
        """The sample `index` of a cell."""

    def longest(self, cells: Iterable[Cell], count: int) -> int:
        """Tokens of the longest prompt among the first `count` samples of each cell."""

    def count(self, cell: Cell, wanted: int) -> int:
        """How many samples of a cell there are, of as many as wanted."""


class Pieces(NamedTuple):
    """The tokens that a prompt is made of.

    Attributes:
        first: with which every text begins.
        before: of what stands before the text.
        facts: of each fact.
        behind: of a sentence behind all facts, if there is one.
        after: of the question and all that stands around it.
    """

    first: list[int]
    before: Encoded
    facts: list[Encoded]
    behind: list[Encoded]
    after: Encoded

    @property
    def size(self) -> int:
        """Tokens of all."""
        every = (self.before, *self.facts, *self.behind, self.after)
        return len(self.first) + sum(len(piece.ids) for piece in every)


Tell = Callable[[Task, int, int | None], Story]
"""A story by its task, its number and how many facts it has, None for as many as it comes with."""


def own(split: Split, seed: int) -> Tell:
    """Our own stories, of a part."""
    return lambda task, index, facts: story(task, split, seed, index, facts)


class Samples:
    """Makes the samples of a set; the same for the same arguments, in any order.

    Args:
        tokenizer: of the model that is asked.
        background: what the facts are hidden in; None if every cell has length 0.
        split: whose stories, and whose words of those that stand between them.
        seed: of the set.
        segment_size: S, to know which facts are cut; None if the model has no segments.
        cut: share of the samples whose first supporting fact is cut by a segment boundary on purpose.
        mentions: sentences that name a person or a place and tell no fact, for every 1,000 tokens.
        mention_kinds: of `MENTIONS`, which come as often as each other.
        prompt: what stands around a text, by task.
        whitespace: "collapsed" if every fact shall have a space before it, the very first as well.
        tell: who tells the stories; our own unless said otherwise.

    Raises:
        ValueError: facts shall be cut, but the segment size is not known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        background: Background | None,
        *,
        split: Split = "test",
        seed: int = 0,
        segment_size: int | None = None,
        cut: float = 0.0,
        mentions: float = 0.0,
        mention_kinds: Sequence[str] = (OF_THE_TEXT,),
        prompt: Callable[[str], Prompt] = lambda task: PLAIN,
        whitespace: Whitespace = "as-is",
        tell: Tell | None = None,
    ) -> None:
        if cut and segment_size is None:
            raise ValueError(
                f"cut is {cut:g}, but it is not known where the model's segments end. Give the segment size "
                "(--segment-size), or leave cut at 0."
            )
        self.encode = Encoder(tokenizer)
        self.first = list(tokenizer("").input_ids)
        self.background = background
        self.split: Split = split
        self.seed = seed
        self.segment_size = segment_size
        self.cut = cut
        self.mentions = mentions
        self.mention_kinds = mention_kinds
        self.prompt = prompt
        self.whitespace = whitespace
        self.tell = tell or own(split, seed)

    def sample(self, task: Task, cell: Cell, index: int) -> Sample:
        """The sample `index` of a cell; of a story that is too long for it another one is taken.

        Raises:
            ValueError: no story fits, or there is no background for it.
        """
        kind = kinds()[cell.kind] if cell.kind else PLAIN_KIND
        for attempt in count():
            # as many stories lie between two attempts as nobody asks for
            one = self._story(task, cell, kind, index + attempt * 10**7)
            random = Random(f"{cell.seed}/{self.split}/{self.seed}/{index}")
            pieces = self._pieces(task, cell, kind, one, random)
            if cell.length == 0 or pieces.size <= cell.length:
                break
            if len(one.facts) <= task.facts[0] or cell.facts is not None or attempt == ATTEMPTS:
                raise ValueError(
                    f"{cell.length:,} tokens were asked for, but facts and question alone take {pieces.size:,}."
                )
        document = self._document(task, cell, kind, pieces, one, index, random)
        starts = tuple(document.starts[1 : 1 + len(one.facts)])
        is_cut = self._is_cut(one, pieces.facts, starts)
        return Sample(cell, index, one, document.ids, starts, is_cut, last_named(task, one.question, one.facts))

    def longest(self, cells: Iterable[Cell], count: int) -> int:
        """Tokens of the longest prompt among the first `count` samples of each cell.

        Raises:
            ValueError: a task has no such stories.
        """
        return max(
            cell.length or max(len(self.sample(task_named(cell.task), cell, i).ids) for i in range(count))
            for cell in cells
        )

    def count(self, cell: Cell, wanted: int) -> int:
        """As many as wanted: there is no end of them."""
        return wanted

    def _story(self, task: Task, cell: Cell, kind: Kind, index: int) -> Story:
        one = self.tell(task, index, (cell.facts if kind.facts is None else kind.facts) or None)
        facts, question = one.facts, one.question
        if kind.untold:
            facts = tuple(fact for fact in facts if question.about not in re.findall(r"\w+", fact.text))
            facts = () if kind.facts == 0 else facts
            question = replace(question, answer=UNKNOWN, supports=(), inferred=None)
        if kind.reworded:
            random = Random(f"reworded/{self.seed}/{index}")
            facts = tuple(replace(fact, text=reworded(fact.text, self.split, random)) for fact in facts)
        return Story(facts, question)

    def _pieces(self, task: Task, cell: Cell, kind: Kind, one: Story, random: Random) -> Pieces:
        prompt = prompts().get(task.name, PLAIN) if kind.prompt else self.prompt(task.name)
        before = self.encode.opening(prompt.before)
        # a text begins with its first sentence, not with a space
        opens = self.whitespace == "as-is" and not prompt.before
        first = opens and (kind.opens or cell.length == 0)
        facts = [
            self.encode.sentence(fact.text, FACTS[kind.form], opens=first and i == 0)
            for i, fact in enumerate(one.facts)
        ]
        behind = []
        if kind.then:
            others = [label for label in task.labels if label != one.question.answer]
            about = one.question.about
            sentence = distractor(self.split, random, persons_of(task), others, (kind.then,), about)
            behind = [self.encode.sentence(sentence)]
        if kind.question or prompt == PLAIN:
            form = QUESTIONS[kind.question or "inline"]
            after = self.encode.sentence(one.question.text, form, opens=first and not facts, asks=True)
        else:
            after = self.encode.closing(prompt.behind(one.question.text))
        return Pieces([] if prompt.whole else self.first, before, facts, behind, after)

    def _document(
        self, task: Task, cell: Cell, kind: Kind, pieces: Pieces, one: Story, index: int, random: Random
    ) -> Document:
        if cell.length == 0:
            ids, starts = self.encode.together([pieces.before, *pieces.facts, *pieces.behind, pieces.after])
            first = len(pieces.first)
            return Document(np.array(pieces.first + ids, dtype=np.int32), [start + first for start in starts])
        if self.background is None:
            raise ValueError(
                f"{cell.length:,} tokens were asked for, but there is no background text to hide facts in."
            )
        supports = one.question.supports
        wished = (index % DEPTHS + random.random()) / DEPTHS
        if supports:
            depths = _around(supports[0], wished, len(one.facts), random)
        else:
            depths = sorted(random.random() for _ in one.facts)
        if kind.opens and depths:
            depths[0] = 0.0
        cuts = []
        # drawn in any case: the rest of a sample does not depend on what is known of segments
        if random.random() < self.cut and self.segment_size and supports:
            cuts.append(Cut(1 + supports[0], self.segment_size))
        rate = self.mentions if kind.mentions is None else kind.mentions
        kinds = self.mention_kinds if kind.mentions is None else MENTIONS
        room = cell.length - pieces.size
        strewn = self._mentions(task, kinds, round(rate * cell.length / 1000), room, random)
        strewn += [(random.uniform(max(depths, default=0.0), 1.0), piece.ids) for piece in pieces.behind]
        told = [pieces.first + pieces.before.ids, *(fact.ids for fact in pieces.facts), pieces.after.ids]
        return weave(told, [0.0, *depths, 1.0], cell.length, self.background, random, cuts, strewn)

    def _mentions(
        self, task: Task, kinds: Sequence[str], wanted: int, room: int, random: Random
    ) -> list[tuple[float, list[int]]]:
        """Sentences with names in them and their depths, as long as they fill no more than half of the room."""
        assert self.background is not None
        rows, found = self.background.mentions, []
        places = [label for label in task.labels if label.islower() and len(label) > 1]
        for _ in range(wanted):
            kind = random.choice(kinds) if len(kinds) > 1 else kinds[0]
            if kind == OF_THE_TEXT:
                if not len(rows):
                    continue
                first, beyond = rows[random.randrange(len(rows))]
                ids = self.background.ids[first:beyond].tolist()
            else:
                sentence = distractor(self.split, random, persons_of(task), places or PLACES, (kind,))
                ids = self.encode.sentence(sentence).ids
            room -= 2 * len(ids)
            if room < 0:
                break
            found.append((random.random(), ids))
        return found

    def _is_cut(self, one: Story, facts: list[Encoded], starts: tuple[int, ...]) -> bool:
        S = self.segment_size
        return S is not None and any(
            starts[fact] // S < (starts[fact] + len(facts[fact].ids) - 1) // S for fact in one.question.supports
        )


def last_named(task: Task, question: Question, facts: Iterable[Fact]) -> str | None:
    """The baseline: the answer that is named last, in facts alone, but for what the question itself names."""
    words = [word for fact in facts for word in re.findall(r"\w+", fact.text)]
    asked = set(re.findall(r"\w+", question.text))
    return next((word for word in reversed(words) if word in task.labels and word not in asked), None)


def persons_of(task: Task) -> Sequence[str]:
    """The people of a task; those of qa1 where it has none."""
    return [topic for topic in task.topics if topic[0].isupper()] or list(task_named("qa1").topics)


def _around(pivot: int, depth: float, count: int, random: Random) -> list[float]:
    """Ascending depths of `count` facts, drawn evenly but for the one that has its own."""
    draws = sorted(random.random() for _ in range(count))
    at = draws[pivot]
    return [depth * u / at if u <= at else depth + (1 - depth) * (u - at) / (1 - at) for u in draws]
