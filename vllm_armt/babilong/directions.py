"""Places that lie beside each other: bAbI's task qa4."""

from __future__ import annotations

from random import Random

from vllm_armt.babilong.episodes import Episode, Question
from vllm_armt.babilong.people import PLACES

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
FURTHER = ("north", "east")
"""Directions of one end of each line: either way round, a fact has one place that lies further there."""


class Directions(Episode):
    """qa4: three places on a line, told in two facts; which one is beside the one in the middle?

    One supporting fact with two arguments. Either of two places may be the subject, of the fact and of the question,
    so that the words alone do not tell which is which.
    """

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        before, self.middle, after = random.sample(PLACES, 3)
        direction = random.choice(list(OPPOSITE))
        self.untold = [(before, direction), (after, OPPOSITE[direction])]
        random.shuffle(self.untold)
        self.told: list[tuple[str, str]] = []

    def tell(self) -> bool:
        if not self.untold:
            return False
        place, direction = self.untold.pop()
        further = place if direction in FURTHER else self.middle
        if self.random.random() < 0.5:
            self._say(f"The {place} is {direction} of the {self.middle}.", place, further)
        else:
            self._say(f"The {self.middle} is {OPPOSITE[direction]} of the {place}.", self.middle, further)
        self.told.append((place, direction))
        return True

    def ask(self) -> Question | None:
        if not self.told:
            return None
        fact = self.random.randrange(len(self.told))
        place, direction = self.told[fact]
        # where the place lies, which half of the questions say the other way round
        text = self.random.choice(
            (f"What is {direction} of the {self.middle}?", f"What is the {self.middle} {OPPOSITE[direction]} of?")
        )
        return Question(text, place, self.middle, (fact,), direction)

    def ask_untold(self) -> Question | None:
        place = self.random.choice([place for place in PLACES if not self._names(place)])
        return self._said(f"What is {self.random.choice(list(OPPOSITE))} of the {place}?", place)
