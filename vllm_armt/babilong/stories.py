"""The tasks, and stories of them that belong to one split each."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal, get_args

from vllm_armt.babilong.directions import OPPOSITE, Directions
from vllm_armt.babilong.episodes import Episode, Fact, Question
from vllm_armt.babilong.pairs import SYMBOLS, Remember, Rewrite
from vllm_armt.babilong.people import NOBODY, OBJECTS, PLACES, Carries, Gives, Moves, Travels

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SHARES: tuple[Split, ...] = ("train",) * 8 + ("validation", "test")


@dataclass(frozen=True)
class Task:
    """One kind of story.

    Attributes:
        name: BABILong's, or the ARMT paper's.
        episode: its world.
        labels: the answers that there are, as BABILong scores them.
        topics: whom or what facts and questions may be about.
        inferences: what may have to be inferred of them.
        facts: how many facts a story has, at least and at most.
        exact: whether an answer must be the label itself, and not only name it; see `scoring`.
    """

    name: str
    episode: Callable[[Random], Episode]
    labels: tuple[str, ...]
    topics: tuple[str, ...]
    facts: tuple[int, int]
    inferences: tuple[str, ...] = ()
    exact: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("qa1", Moves, PLACES, Moves.people, (2, 10)),
        Task("qa2", Carries, PLACES, (*Carries.people, *OBJECTS), (4, 88), (*PLACES, *Carries.people, NOBODY)),
        Task("qa3", Travels, PLACES, (*Travels.people, *OBJECTS), (8, 228), (*PLACES, *Travels.people)),
        Task("qa4", Directions, PLACES, PLACES, (2, 2), (*PLACES, *OPPOSITE)),
        Task("qa5", Gives, (*Gives.people, *OBJECTS), (*Gives.people, *OBJECTS), (4, 102), (*PLACES, *OBJECTS)),
        Task("remember", Remember, SYMBOLS, SYMBOLS, (10, 50), exact=True),
        Task("rewrite", Rewrite, SYMBOLS, SYMBOLS, (10, 50), exact=True),
    )
}

NAMES = frozenset(name for task in TASKS.values() for name in (*task.labels, *task.topics)) | OPPOSITE.keys()
"""Every person, place, thing, direction and symbol."""


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.")
    return TASKS[name]


@dataclass(frozen=True)
class Story:
    """Facts, and a question that they answer."""

    facts: tuple[Fact, ...]
    question: Question


def split_of(facts: Iterable[Fact]) -> Split:
    """The split that a sequence of facts belongs to, whoever draws it: 8 of 10 to train, one each to the others.

    It depends on who, what and where in each fact and on nothing else. So no split holds a draw of another's, not
    even in other words, and whatever the seeds.
    """
    draw = ";".join(" ".join(word for word in re.findall(r"\w+", fact.text) if word in NAMES) for fact in facts)
    return _SHARES[zlib.crc32(draw.encode()) % len(_SHARES)]


def _length(task: Task, random: Random) -> int:
    """Facts of a story; where the longest are many times the shortest they are few, as in bAbI."""
    least, most = task.facts
    if most <= 10 * least:
        return random.randint(least, most)
    return round(math.exp(random.uniform(math.log(least), math.log(most))))


def story(task: Task, split: Split, seed: int, index: int, facts: int | None = None) -> Story:
    """A story; the same one for the same arguments.

    Args:
        task: of which.
        split: whose draws it is from.
        seed: of all stories of a set.
        index: which of them.
        facts: how many facts it has, and as many more as the question needs. [default: drawn within the task's limits]

    Raises:
        ValueError: the task has no story of so many facts.
    """
    for attempt in count():
        random = Random(f"{task.name}/{split}/{seed}/{index}/{facts}/{attempt}")
        episode = task.episode(random)
        wanted = _length(task, random) if facts is None else facts
        question = None
        while len(episode.facts) < wanted or (question := episode.ask()) is None:
            if not episode.tell():
                raise ValueError(f"{task.name} has no stories of {wanted} facts; it has at most {task.facts[1]}.")
        if split_of(episode.facts) == split:
            return Story(tuple(episode.facts), question)
    raise AssertionError("count() does not end")
