"""Streams in which facts happen, text goes by, and questions are asked all along."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from examples.train.mentions import Mentions
from examples.train.recipe import Level, Stage
from vllm_armt.babilong import (
    Background,
    Cut,
    Document,
    Encoder,
    Episode,
    Fact,
    Question,
    Split,
    split_of,
    task_named,
    weave,
)

NONE = -100
"""A target that is none, as torch's cross entropy knows it."""

LURES = 8
"""Further questions that are drawn in search of one that a later fact seems to answer otherwise."""

ATTEMPTS = 1000
"""Draws of a stream, each with a fact less than one that was too long."""


@dataclass
class Piece:
    """A sentence of a stream.

    Attributes:
        ids: its tokens; after a question, as much of the answer as is shown.
        depth: where in the stream, from 0 to 1.
        about: whom or what it is about.
        clear_at: the token at which that is clear: a fact's last word, or the question mark.
        inferred: what must be inferred there, if anything.
        targets: of a question, what its tokens from `clear_at` on must predict.
        supports: of a question, the facts that answer it.
    """

    ids: list[int]
    depth: float
    about: str
    clear_at: int
    inferred: str | None = None
    targets: tuple[int, ...] = ()
    supports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stream:
    """One row of a batch, `[T]` each; where there is nothing to predict, all but `ids`, `cuts` and `told` are -100.

    Attributes:
        ids: tokens.
        answers: what a token must predict, of an answer.
        topics: at which token it must be clear whom or what a sentence is about, as a class.
        inferences: at which token it must be clear what is to be inferred there, as a class.
        begun: at the last word of a fact that a segment boundary cuts, whom or what it is about, which stands in the
            segment before, as a class of the topics.
        distances: at an answer's first target, how many segments ago the first fact that it needs began.
        cuts: 1 at an answer's first target if a segment boundary runs through a fact that it needs.
        told: 1 at the tokens of facts.
    """

    ids: np.ndarray
    answers: np.ndarray
    topics: np.ndarray
    inferences: np.ndarray
    begun: np.ndarray
    distances: np.ndarray
    cuts: np.ndarray
    told: np.ndarray


def classes(tasks: Iterable[str]) -> dict[str, list[str]]:
    """What each auxiliary head may say of some tasks, in order: what sentences are about, and what is inferred."""
    chosen = [task_named(name) for name in tasks]
    topics = sorted({topic for task in chosen for topic in task.topics})
    inferences = sorted({inference for task in chosen for inference in task.inferences})
    return {"topics": topics, "inferences": inferences, "begun": topics}


class Streams:
    """Draws streams of one split.

    Args:
        tokenizer: of the model; its end-of-text token follows the answer to a stream's last question.
        background: text between the sentences; None for sentences alone, filled up with end-of-text.
        tasks: which ones' topics and inferences are told apart, each by its place in their order.
        split: whose draws.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, background: Background | None, tasks: Iterable[str], split: Split
    ) -> None:
        self.encode = Encoder(tokenizer)
        self.end = tokenizer.eos_token_id
        self.background = background
        self.mentions = Mentions(background, tokenizer) if background is not None else None
        self.classes = {kind: {name: i for i, name in enumerate(names)} for kind, names in classes(tasks).items()}
        self.split = split

    def draw(self, random: Random, stage: Stage, level: Level, hold: bool) -> Stream:
        """A stream of a level; with `hold`, one whose facts all come in its first quarter."""
        (name,) = random.choices(list(stage.tasks), list(stage.tasks.values()))
        T = level.segments * stage.segment_size
        facts = max(1, _about(level.facts, level.segments, random))
        task = task_named(name)
        for _ in range(ATTEMPTS):
            episode = task.episode(random)
            ask = partial(_ask, episode, task.labels, random, stage.lured)
            pieces = self._pieces(episode, ask, random, level, facts, 0.25 if hold else 1.0)
            if not self._fits(pieces, T):
                facts = max(1, facts - 1)
            elif split_of(episode.facts) == self.split:
                return self._stream(pieces, random, stage, T)
        raise ValueError(f"{T} tokens are too few for the facts and a question of {name}: lengthen the stream.")

    def text(self, random: Random, stage: Stage, T: int) -> np.ndarray:
        """T tokens in which nothing is told: background, with the stage's mentions."""
        return self._document([], random, stage, T, []).ids

    def _pieces(
        self,
        episode: Episode,
        ask: Callable[[], Question | None],
        random: Random,
        level: Level,
        facts: int,
        span: float,
    ) -> list[Piece]:
        """Facts and questions in the order in which they happen; the last question with its whole answer.

        There are more facts if the last question cannot be asked before.
        """
        moments = [(random.uniform(0, span), False) for _ in range(facts)]
        moments += [(random.random(), True) for _ in range(_about(level.questions, level.segments, random))]
        pieces: list[Piece] = []
        for depth, asks in [*sorted(moments), *((1.0, True) for _ in range(level.last))]:
            if not asks:
                if episode.tell():
                    pieces.append(self._fact(episode.facts[-1], depth))
            elif question := ask():
                piece = self._question(question, depth)
                # the same question again, with nothing in between, teaches nothing
                if not pieces or pieces[-1].ids != piece.ids:
                    pieces.append(piece)
        while not pieces[-1].targets:
            if question := ask():
                pieces.append(self._question(question, 1.0))
            else:
                episode.tell()
                pieces.append(self._fact(episode.facts[-1], 1.0))
        pieces[-1].ids += [pieces[-1].targets[-1]]
        pieces[-1].targets += (self.end,)
        return pieces

    def _fact(self, fact: Fact, depth: float) -> Piece:
        ids = self.encode(f" {fact.text}")
        return Piece(list(ids), depth, fact.about, len(ids) - 2, fact.inferred)

    def _question(self, question: Question, depth: float) -> Piece:
        # the answer is predicted and not shown, so that a model learns nothing new from being asked
        ids, answer = self.encode(f" {question.text}"), self.encode(f" {question.answer}")
        clear_at, targets = len(ids) - 1, tuple(answer)
        return Piece(ids + answer[:-1], depth, question.about, clear_at, question.inferred, targets, question.supports)

    def _fits(self, pieces: list[Piece], T: int) -> bool:
        """Leave out questions, but for the last, until the stream is no longer than it should be; whether it is."""
        asked = [i for i, piece in enumerate(pieces[:-1]) if piece.targets]
        while asked and sum(len(piece.ids) for piece in pieces) > T:
            del pieces[asked.pop()]
        return sum(len(piece.ids) for piece in pieces) <= T

    def _stream(self, pieces: list[Piece], random: Random, stage: Stage, T: int) -> Stream:
        S = stage.segment_size
        facts = [i for i, piece in enumerate(pieces) if not piece.targets]
        cuts = []
        # what a stage does not ask for is not drawn: streams of recipes without it stay what they were
        if stage.overrun and random.random() < stage.overrun:
            last = pieces[-1]
            shown = random.randrange(len(last.targets) - 1)
            cuts = [Cut(len(pieces) - 1, S, last.clear_at + 1 + shown)]
        if random.random() < stage.cut:
            needed = facts[pieces[-1].supports[0]]
            also = [i for i in facts if i != needed and stage.also_cut and random.random() < stage.also_cut]
            cuts += [Cut(i, S) for i in (needed, *also)]
        document = self._document(pieces, random, stage, T, cuts)
        answers, topics, inferences, begun, distances = (np.full(T, NONE) for _ in range(5))
        is_cut, told = (np.zeros(T, dtype=np.int64) for _ in range(2))
        for piece, start in zip(pieces, document.starts, strict=True):
            clear = start + piece.clear_at
            about = self.classes["topics"].get(piece.about, NONE)
            # what stands in another segment cannot be seen from here, but be remembered
            if start // S == clear // S:
                topics[clear] = about
            elif not piece.targets:
                begun[clear] = about
            if piece.inferred is not None:
                inferences[clear] = self.classes["inferences"].get(piece.inferred, NONE)
            if piece.targets:
                answers[clear : clear + len(piece.targets)] = piece.targets
                spans = [(document.starts[i], len(pieces[i].ids)) for i in (facts[fact] for fact in piece.supports)]
                distances[clear] = clear // S - min(spans)[0] // S
                is_cut[clear] = any(begin // S < (begin + size - 1) // S for begin, size in spans)
            else:
                told[start : start + len(piece.ids)] = 1
        return Stream(document.ids, answers, topics, inferences, begun, distances, is_cut, told)

    def _document(self, pieces: list[Piece], random: Random, stage: Stage, T: int, cuts: list[Cut]) -> Document:
        tokens = [piece.ids for piece in pieces]
        sizes = np.cumsum([0, *map(len, tokens)])
        if self.background is not None and self.mentions is not None:
            tasks = [task_named(name) for name in stage.tasks]
            names = sorted({name for task in tasks for name in (*task.labels, *task.topics)})
            count = int(stage.mentions * T / 1000 + random.random())
            strewn = self.mentions.draw(names, count, T - int(sizes[-1]), random, stage.paired)
            breaks = [
                Cut(len(pieces) + i, stage.segment_size, at)
                for i, mention in enumerate(strewn)
                if stage.broken and random.random() < stage.broken and (at := mention.like_cut(random))
            ]
            texts = [(mention.depth, mention.ids) for mention in strewn]
            depths = [piece.depth for piece in pieces]
            return weave(tokens, depths, T, self.background, random, [*cuts, *breaks], texts)
        filled = np.concatenate([*tokens, [self.end] * (T - sizes[-1])]).astype(np.int32)
        return Document(filled, sizes[:-1].tolist())


def _ask(episode: Episode, labels: Sequence[str], random: Random, lured: float) -> Question | None:
    """A question; at a rate of `lured` one that a later fact seems to answer otherwise, if one is soon found."""
    question = episode.ask()
    if question is None or not lured or random.random() >= lured:
        return question
    drawn = (question, *(other for _ in range(LURES) if (other := episode.ask())))
    return next((one for one in drawn if is_lured(one, episode.facts, labels)), question)


def is_lured(question: Question, facts: Sequence[Fact], labels: Sequence[str]) -> bool:
    """Whether a fact after those that a question needs, about the same person, names another answer."""
    about = {facts[i].about for i in question.supports}
    others = set(labels) - {question.answer}
    later = facts[question.supports[-1] + 1 :]
    return any(fact.about in about and others & set(re.findall(r"\w+", fact.text)) for fact in later)


def _about(rates: tuple[float, float], segments: int, random: Random) -> int:
    """A count for a stream, of a rate a segment that is drawn evenly in the logarithm."""
    least, most = rates
    rate = math.exp(random.uniform(math.log(least), math.log(most))) if least > 0 else random.uniform(least, most)
    return int(rate * segments + random.random())
