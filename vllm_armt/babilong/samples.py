"""What a model is asked: a story hidden in a document, and the tokens of the prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.background import Background, Tokens
from vllm_armt.babilong.documents import Cut, Document, weave
from vllm_armt.babilong.stories import Split, Story, Task, story, task_named

DEPTHS = 10
"""Equal parts of a document; the samples of a cell go through them in turn with the first supporting fact."""

PROMPTS = {
    "plain": ("", " {question}"),
    "instruct": (
        "Some sentences in the text below tell facts about {topics}. They are hidden in a text that has nothing to do "
        "with them. Answer the question from these facts alone; where they changed in time, the last one counts. "
        "Answer with one word.\n<context>\n",
        "\n</context>\nQuestion: {question}\nAnswer:",
    ),
}
"""Text before the document and after it: as models are trained for the task, and for models that are not."""


@dataclass(frozen=True)
class Cell:
    """Samples of one kind.

    Attributes:
        task: its name.
        length: tokens of a prompt; 0 for the story alone, without background.
        facts: of a story; None for as many as the task has.
    """

    task: str
    length: int
    facts: int | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt, and what is known of it.

    Attributes:
        cell: what it is a sample of.
        index: which one.
        story: the facts, the question and its answer.
        ids: tokens of the prompt, int32.
        starts: where each fact begins, in tokens.
        is_cut: whether a segment boundary runs through a supporting fact.
    """

    cell: Cell
    index: int
    story: Story
    ids: Tokens
    starts: tuple[int, ...]
    is_cut: bool

    @property
    def supports(self) -> tuple[int, ...]:
        """Where the supporting facts begin, in tokens."""
        return tuple(self.starts[fact] for fact in self.story.question.supports)

    @property
    def depth(self) -> float:
        """Where the first supporting fact begins, as a share of the prompt."""
        return self.supports[0] / len(self.ids)


class Encoder:
    """Tokens of sentences as they follow another sentence."""

    _BEFORE = "."

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that begins with a space or a new line.

        Raises:
            ValueError: the tokenizer would join it with what stands before.
        """
        if text not in self.known:
            before = self._tokens(self._BEFORE)
            tokens = self._tokens(self._BEFORE + text)
            if tokens[: len(before)] != before:
                raise ValueError(f"The tokenizer joins {text!r} with the full stop before it, so it cannot be placed.")
            self.known[text] = tokens[len(before) :]
        return self.known[text]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


class Samples:
    """Makes the samples of a set; the same for the same arguments, in any order.

    Args:
        tokenizer: of the model that is asked.
        background: what the facts are hidden in; None if every cell has length 0.
        split: whose stories.
        seed: of the set.
        segment_size: S, to know which facts are cut; None if the model has no segments.
        cut: share of the samples whose first supporting fact is cut by a segment boundary on purpose.
        mentions: sentences of the background with a name in them that are strewn in, for every 1,000 tokens.
        prompt: a key of `PROMPTS`.

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
        prompt: str = "plain",
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
        self.prompt = PROMPTS[prompt]

    def sample(self, task: Task, cell: Cell, index: int) -> Sample:
        """The sample `index` of a cell.

        Raises:
            ValueError: the story does not fit, or there is no background for it.
        """
        one = story(task, self.split, self.seed, index, cell.facts)
        random = Random(f"{cell}/{self.split}/{self.seed}/{index}")
        before, after = (text.format(question=one.question.text, topics=", ".join(task.topics)) for text in self.prompt)
        facts = [self.encode(f" {fact.text}") for fact in one.facts]
        pieces = [self.first + (self.encode(before) if before else []), *facts, self.encode(after)]
        document = self._document(cell, pieces, one, index, random)
        starts = tuple(document.starts[1 : 1 + len(facts)])
        return Sample(cell, index, one, document.ids, starts, self._is_cut(one, facts, starts))

    def longest(self, cells: Iterable[Cell], count: int) -> int:
        """Tokens of the longest prompt among the first `count` samples of each cell.

        Raises:
            ValueError: a task has no such stories.
        """
        return max(
            cell.length or max(len(self.sample(task_named(cell.task), cell, i).ids) for i in range(count))
            for cell in cells
        )

    def _document(self, cell: Cell, pieces: list[list[int]], one: Story, index: int, random: Random) -> Document:
        if cell.length == 0:
            sizes = [len(piece) for piece in pieces]
            return Document(np.concatenate(pieces).astype(np.int32), np.cumsum([0, *sizes[:-1]]).tolist())
        if self.background is None:
            raise ValueError(
                f"{cell.length:,} tokens were asked for, but there is no background text to hide facts in."
            )
        pivot = one.question.supports[0]
        wished = (index % DEPTHS + random.random()) / DEPTHS
        depths = [0.0, *_around(pivot, wished, len(one.facts), random), 1.0]
        cuts = []
        # drawn in any case: the rest of a sample does not depend on what is known of segments
        if random.random() < self.cut and self.segment_size:
            cuts.append(Cut(1 + pivot, self.segment_size))
        room = cell.length - sum(map(len, pieces))
        strewn = self._mentions(round(self.mentions * cell.length / 1000), room, random)
        return weave(pieces, depths, cell.length, self.background, random, cuts, strewn)

    def _mentions(self, count: int, room: int, random: Random) -> list[tuple[float, list[int]]]:
        """Sentences with a name in them and their depths, as long as they fill no more than half of the room."""
        assert self.background is not None
        rows, found = self.background.mentions, []
        for _ in range(count if len(rows) else 0):
            first, beyond = rows[random.randrange(len(rows))]
            room -= 2 * int(beyond - first)
            if room < 0:
                break
            found.append((random.random(), self.background.ids[first:beyond].tolist()))
        return found

    def _is_cut(self, one: Story, facts: list[list[int]], starts: tuple[int, ...]) -> bool:
        S = self.segment_size
        return S is not None and any(
            starts[fact] // S < (starts[fact] + len(facts[fact]) - 1) // S for fact in one.question.supports
        )


def _around(pivot: int, depth: float, count: int, random: Random) -> list[float]:
    """Ascending depths of `count` facts, drawn evenly but for the one that has its own."""
    draws = sorted(random.random() for _ in range(count))
    at = draws[pivot]
    return [depth * u / at if u <= at else depth + (1 - depth) * (u - at) / (1 - at) for u in draws]
