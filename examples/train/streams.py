"""Streams in which facts happen, text goes by, and questions are asked all along."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    reworded,
    split_of,
    task_named,
    weave,
)
from vllm_armt.babilong.forms import FACTS, INLINE, QUESTIONS, Form
from vllm_armt.babilong.prompts import prompts

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
        asks_at: of a question, its last token: what closes its form stands between it and the question mark.
        targets: of a question, what its tokens from `asks_at` on must predict.
        supports: of a question, the facts that answer it.
    """

    ids: list[int]
    depth: float
    about: str
    clear_at: int
    inferred: str | None = None
    asks_at: int = 0
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
        self.instructions = [self.encode(text) for text in instructions()]
        self.end = tokenizer.eos_token_id
        self.background = background
        self.mentions = Mentions(background, tokenizer) if background is not None else None
        self.classes = {kind: {name: i for i, name in enumerate(names)} for kind, names in classes(tasks).items()}
        self.split = split

    def draw(self, random: Random, stage: Stage, level: Level, hold: bool) -> Stream:
        """A stream of a level; with `hold`, one whose facts all come in its first quarter."""
        (name,) = random.choices(list(stage.tasks), list(stage.tasks.values()))
        T = level.segments * stage.segment_size
        task = task_named(name)
        is_empty = _happens(stage.empty, random)
        is_brief = level.segments == 1 and _happens(stage.brief, random)
        facts = 0 if is_empty else max(1, _about(level.facts, level.segments, random))
        for _ in range(ATTEMPTS):
            episode = task.episode(random)
            ask = partial(_ask, episode, task.labels, random, stage, is_empty)
            pieces = self._pieces(episode, ask, random, stage, level, facts, 0.25 if hold else 1.0, is_brief)
            if not self._fits(pieces, T):
                facts = max(1, facts - 1)
            elif is_empty or split_of(episode.facts) == self.split:
                return self._stream(pieces, random, stage, T, is_brief)
        raise ValueError(f"{T} tokens are too few for the facts and a question of {name}: lengthen the stream.")

    def text(self, random: Random, stage: Stage, T: int) -> np.ndarray:
        """T tokens in which nothing is told: background, with the stage's mentions."""
        return self._document([], random, stage, T, []).ids

    def _pieces(
        self,
        episode: Episode,
        ask: Callable[[], Question | None],
        random: Random,
        stage: Stage,
        level: Level,
        facts: int,
        span: float,
        is_brief: bool,
    ) -> list[Piece]:
        """Facts and questions in the order in which they happen; the last question with its whole answer.

        There are more facts if the last question cannot be asked before.
        """
        moments = [(random.uniform(0, span), False) for _ in range(facts)]
        moments += [(random.random(), True) for _ in range(_about(level.questions, level.segments, random))]
        # who types facts types them all in one form; and a text may begin with a fact
        every = random.choice(list(FACTS.values())) if is_brief and _happens(stage.forms, random) else None
        opens = is_brief or _happens(stage.forms / 4, random)
        pieces: list[Piece] = []

        def tell(depth: float) -> None:
            if episode.tell():
                is_first = opens and not pieces
                form = every or _form(FACTS, stage.forms, random)
                pieces.append(self._fact(episode.facts[-1], 0.0 if is_first else depth, form, random, stage, is_first))

        last = random.randint(1, level.last) if is_brief else level.last
        for depth, asks in [*sorted(moments), *((1.0, True) for _ in range(last))]:
            if not asks:
                tell(depth)
            elif question := ask():
                form = _form(QUESTIONS, stage.forms, random)
                piece = self._question(question, depth, form, _happens(stage.shown, random), is_brief and not pieces)
                # the same question again, with nothing in between, teaches nothing
                if not pieces or pieces[-1].ids != piece.ids:
                    pieces.append(piece)
        while not pieces or not pieces[-1].targets:
            if question := ask():
                form = _form(QUESTIONS, stage.forms, random)
                pieces.append(self._question(question, 1.0, form, True, is_brief and not pieces))
            else:
                tell(1.0)
        final = pieces[-1]
        if self.end not in final.targets:
            final.ids += [final.targets[-1]]
            final.targets += (self.end,)
        # nothing stands between the answer and the end
        del final.ids[final.asks_at + len(final.targets) :]
        return pieces

    def _fact(self, fact: Fact, depth: float, form: Form, random: Random, stage: Stage, opens: bool) -> Piece:
        text = reworded(fact.text, self.split, random) if _happens(stage.reworded, random) else fact.text
        piece = self.encode.sentence(text, form, opens=opens)
        # the last word, before the full stop
        clear_at = self.encode.within(piece, len(text) - 2)
        return Piece(list(piece.ids), depth, fact.about, clear_at, fact.inferred)

    def _question(self, question: Question, depth: float, form: Form, shown: bool, opens: bool) -> Piece:
        """A question; if its answer is not shown, the model learns nothing new from being asked."""
        piece = self.encode.sentence(question.text, form, opens=opens, asks=True)
        answer = self.encode(question.answer) if self.encode.trails else self.encode(f" {question.answer}")
        ids, asks_at, targets = list(piece.ids), len(piece.ids) - 1, tuple(answer)
        clear_at = self.encode.within(piece, len(question.text) - 1)
        if shown:
            ids, targets = ids + answer + self.encode("\n"), (*targets, self.end)
        else:
            ids += answer[:-1]
        return Piece(ids, depth, question.about, clear_at, question.inferred, asks_at, targets, question.supports)

    def _fits(self, pieces: list[Piece], T: int) -> bool:
        """Leave out questions, but for the last, until the stream is no longer than it should be; whether it is."""
        asked = [i for i, piece in enumerate(pieces[:-1]) if piece.targets]
        while asked and sum(len(piece.ids) for piece in pieces) > T:
            del pieces[asked.pop()]
        return sum(len(piece.ids) for piece in pieces) <= T

    def _stream(self, pieces: list[Piece], random: Random, stage: Stage, T: int, is_brief: bool) -> Stream:
        S = stage.segment_size
        facts = [i for i, piece in enumerate(pieces) if not piece.targets]
        cuts = []
        last = pieces[-1]
        # what a stage does not ask for is not drawn: streams of recipes without it stay what they were
        if _happens(stage.overrun, random):
            shown = random.randrange(len(last.targets) - 1)
            cuts = [Cut(len(pieces) - 1, S, last.asks_at + 1 + shown)]
        if random.random() < stage.cut and last.supports:
            needed = facts[last.supports[0]]
            also = [i for i in facts if i != needed and _happens(stage.also_cut, random)]
            cuts += [Cut(i, S) for i in (needed, *also)]
        document = self._document(pieces, random, stage, T, cuts, is_brief)
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
                asked = start + piece.asks_at
                answers[asked : asked + len(piece.targets)] = piece.targets
                spans = [(document.starts[i], len(pieces[i].ids)) for i in (facts[fact] for fact in piece.supports)]
                # what nothing was told of is as far away from everywhere
                distances[asked] = asked // S - min(spans)[0] // S if spans else 0
                is_cut[asked] = any(begin // S < (begin + size - 1) // S for begin, size in spans)
            else:
                told[start : start + len(piece.ids)] = 1
        return Stream(document.ids, answers, topics, inferences, begun, distances, is_cut, told)

    def _document(
        self, pieces: list[Piece], random: Random, stage: Stage, T: int, cuts: list[Cut], is_brief: bool = False
    ) -> Document:
        tokens = [piece.ids for piece in pieces]
        sizes = np.cumsum([0, *map(len, tokens)])
        room = T - int(sizes[-1])
        instruction: list[int] = []
        if _happens(stage.instructed, random):
            chosen = random.choice(self.instructions)
            instruction = chosen if len(chosen) <= room // 2 else []
        if self.background is None or self.mentions is None or is_brief:
            filled = [instruction, *tokens, [self.end] * (room - len(instruction))]
            return Document(np.concatenate(filled).astype(np.int32), (sizes[:-1] + len(instruction)).tolist())
        tasks = [task_named(name) for name in stage.tasks]
        names = sorted({name for task in tasks for name in (*task.labels, *task.topics)})
        count = int(stage.mentions * T / 1000 + random.random())
        made = sum(_happens(stage.distracting, random) for _ in range(count))
        strewn = self.mentions.draw(names, count - made, room - len(instruction), random, stage.paired)
        strewn += self.mentions.distract(names, made, random, self.split, stage.forms)
        while strewn and sum(len(mention.ids) for mention in strewn) > (room - len(instruction)) // 2:
            strewn.pop(random.randrange(len(strewn)))
        texts = [(mention.depth, mention.ids) for mention in strewn]
        breaks = [
            Cut(len(pieces) + i, stage.segment_size, at)
            for i, mention in enumerate(strewn)
            if stage.broken and random.random() < stage.broken and (at := mention.like_cut(random))
        ]
        if instruction:
            # before all that stands at 0
            texts.append((-1.0, instruction))
        depths = [piece.depth for piece in pieces]
        return weave(tokens, depths, T, self.background, random, [*cuts, *breaks], texts)


def instructions() -> list[str]:
    """What may stand before a text: the prompts that are ours, whole and without examples."""
    found = []
    for prompt in prompts().values():
        found += [prompt.before, prompt.before.partition("<example>")[0], "<context>\n"]
    return found


def _happens(share: float, random: Random) -> bool:
    # a share of 0 draws nothing
    return share > 0 and random.random() < share


def _form(forms: Mapping[str, Form], share: float, random: Random) -> Form:
    return random.choice(list(forms.values())) if _happens(share, random) else INLINE


def _ask(
    episode: Episode, labels: Sequence[str], random: Random, stage: Stage, is_empty: bool = False
) -> Question | None:
    """A question; at the stage's rates one that nothing answers, or one that a later fact seems to answer otherwise, if
    there is any."""
    if (is_empty or _happens(stage.unknown, random)) and (question := episode.ask_untold()):
        return question
    question = episode.ask()
    if question is None or not _happens(stage.lured, random):
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
