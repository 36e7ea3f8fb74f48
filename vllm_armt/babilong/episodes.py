"""What stories are made of: facts that happen one after another, and questions that can be asked at any time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random

UNKNOWN = "unknown"
"""The answer about whom or what nothing was told of."""


@dataclass(frozen=True)
class Fact:
    """A sentence of a story.

    Attributes:
        text: "Mary moved to the bathroom."
        about: whom or what it tells something of: "Mary".
        inferred: what must be worked out of it and of earlier facts, if anything: the place where a thing was dropped,
            the thing that is given to somebody.
    """

    text: str
    about: str
    inferred: str | None = None


@dataclass(frozen=True)
class Question:
    """A question that the facts so far answer.

    Attributes:
        text: "Where is Mary?"
        answer: "bathroom".
        about: whom or what it asks after: "Mary".
        supports: the facts that the answer follows from, as indices in the order they were told; none where it is that
            nothing was told.
        inferred: what must be worked out on the way to the answer, if anything: who has the thing that is asked after.
    """

    text: str
    answer: str
    about: str
    supports: tuple[int, ...]
    inferred: str | None = None


class Episode(ABC):
    """A world in which things happen.

    Attributes:
        random: where all its draws come from.
        facts: what has been told.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.facts: list[Fact] = []

    @abstractmethod
    def tell(self) -> bool:
        """Let one more thing happen and tell it in `facts`; False if there is no more to tell."""

    @abstractmethod
    def ask(self) -> Question | None:
        """A question about what was told; None if there is none yet."""

    def ask_untold(self) -> Question | None:
        """A question that nothing told so far answers; None if there is none."""
        return None

    def _said(self, text: str, about: str) -> Question:
        """A question after what was never told of."""
        return Question(text, UNKNOWN, about, ())

    def _names(self, name: str) -> bool:
        """Whether a fact names somebody or something."""
        return any(name in re.findall(r"\w+", fact.text) for fact in self.facts)

    def _say(self, text: str, about: str, inferred: str | None = None) -> int:
        """Tell a fact and return its index."""
        self.facts.append(Fact(text, about, inferred))
        return len(self.facts) - 1
