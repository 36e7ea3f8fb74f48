"""Worlds of people who move, take things, drop them and hand them on: bAbI's tasks qa1, qa2, qa3 and qa5.

The sentences are those of bAbI (arXiv 1502.05698); the worlds are written here, as bAbI's simulator is not at hand.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar, NamedTuple

from vllm_armt.babilong.episodes import Episode, Question

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
GO = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TAKE = ("got", "grabbed", "picked up", "took")
DROP = ("discarded", "dropped", "left", "put down")
GIVE = ("gave", "handed", "passed")

STRANGERS = ("Peter", "Alice", "Emma", "Paul", "Laura", "Tom", "Charlie", "Judith")
"""Of whom no story ever tells."""

NOBODY = "nobody"
"""Who holds a thing that lies somewhere."""


class Known(NamedTuple):
    """A place or a person, and the facts from which it is known."""

    value: str
    facts: tuple[int, ...]


class Moves(Episode):
    """qa1: where is a person? One supporting fact, the person's last move."""

    people: ClassVar[tuple[str, ...]] = ("Daniel", "John", "Mary", "Sandra")

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.place_of: dict[str, Known] = {}

    def tell(self) -> bool:
        self._move(self.random.choice(self.people))
        return True

    def ask(self) -> Question | None:
        if not self.place_of:
            return None
        person, place = self.random.choice(list(self.place_of.items()))
        return Question(f"Where is {person}?", place.value, person, place.facts)

    def ask_untold(self) -> Question | None:
        person = self.random.choice([person for person in self.people if person not in self.place_of] or STRANGERS)
        if self.random.random() < 0.25:
            person = self.random.choice(STRANGERS)
        return self._said(f"Where is {person}?", person)

    def _move(self, person: str) -> Known:
        here = self.place_of.get(person)
        place = self.random.choice([place for place in PLACES if here is None or place != here.value])
        fact = self._say(f"{person} {self.random.choice(GO)} the {place}.", person)
        self.place_of[person] = Known(place, (fact,))
        return self.place_of[person]


class Carries(Moves):
    """qa2: where is a thing? Two supporting facts, of who has or had it and where that person was."""

    move_share: ClassVar[float] = 0.5
    """Of the facts, how many are moves; with fewer it is hard to follow who carries what where."""
    takes_without_there: ClassVar[bool] = False
    """Whether a thing may be taken without saying "there"; in bAbI's qa2 and qa5 it never is."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.holder: dict[str, Known] = {}
        self.lies: dict[str, Known] = {}

    def tell(self) -> bool:
        handlings = self._handlings()
        if handlings and self.random.random() >= self.move_share:
            self._handle(*self.random.choice(handlings))
        else:
            self._move(self.random.choice(self.people))
        return True

    def ask(self) -> Question | None:
        places = {thing: place for thing in OBJECTS if (place := self._place_of_thing(thing))}
        if not places:
            return None
        thing, place = self.random.choice(list(places.items()))
        holder = self.holder[thing].value if thing in self.holder else NOBODY
        return Question(f"Where is the {thing}?", place.value, thing, place.facts, holder)

    def ask_untold(self) -> Question | None:
        return self._untold("Where is the {}?")

    def _untold(self, asked: str) -> Question | None:
        things = [thing for thing in OBJECTS if not self._names(thing)]
        if not things:
            return None
        thing = self.random.choice(things)
        return self._said(asked.format(thing), thing)

    def _place_of_thing(self, thing: str) -> Known | None:
        if thing in self.holder:
            holder = self.holder[thing]
            place = self.place_of.get(holder.value)
            return place and Known(place.value, tuple(sorted(place.facts + holder.facts)))
        return self.lies.get(thing)

    def _handlings(self) -> list[tuple[str, str, str]]:
        """What could be done with things: (deed, person, thing)."""
        takes = [
            ("take", person, thing)
            for person, place in self.place_of.items()
            for thing in OBJECTS
            if thing not in self.holder and (thing not in self.lies or self.lies[thing].value == place.value)
        ]
        return takes + [("drop", holder.value, thing) for thing, holder in self.holder.items()]

    def _handle(self, deed: str, person: str, thing: str) -> None:
        there = self.random.choice((" there", "")) if deed != "take" or self.takes_without_there else " there"
        verb = self.random.choice(TAKE if deed == "take" else DROP)
        place = self.place_of.get(person)
        # where a thing is taken does not matter, as it goes with who has it
        lies = place.value if place and deed == "drop" else None
        fact = self._say(f"{person} {verb} the {thing}{there}.", person, lies)
        if deed == "take":
            self.lies.pop(thing, None)
            self.holder[thing] = Known(person, (fact,))
        else:
            del self.holder[thing]
            # a thing that was dropped who knows where may be found anywhere
            if place is not None:
                self.lies[thing] = Known(place.value, (*place.facts, fact))


class Travels(Carries):
    """qa3: where was a thing before another place? Three supporting facts: taken, carried there, carried on."""

    takes_without_there: ClassVar[bool] = True

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.came_from: dict[tuple[str, str], Known] = {}

    def ask(self) -> Question | None:
        if not self.came_from:
            return None
        (thing, place), before = self.random.choice(list(self.came_from.items()))
        text = f"Where was the {thing} before the {place}?"
        # all of these facts are about whoever carried it
        return Question(text, before.value, thing, before.facts, self.facts[before.facts[0]].about)

    def ask_untold(self) -> Question | None:
        return self._untold(f"Where was the {{}} before the {self.random.choice(PLACES)}?")

    def _move(self, person: str) -> Known:
        here = self.place_of.get(person)
        there = super()._move(person)
        for thing, holder in self.holder.items():
            if holder.value == person and here is not None:
                facts = tuple(sorted(here.facts + holder.facts)) + there.facts
                self.came_from[thing, there.value] = Known(here.value, facts)
        return there


class Given(NamedTuple):
    """One handing over."""

    giver: str
    thing: str
    receiver: str


class Gives(Carries):
    """qa5: who gave what to whom? One supporting fact with three arguments, the last one that fits the question."""

    people: ClassVar[tuple[str, ...]] = ("Bill", "Fred", "Jeff", "Mary")

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.given: list[tuple[Given, int]] = []

    def ask(self) -> Question | None:
        if not self.given:
            return None
        giver, thing, receiver = self.random.choice(self.given)[0]
        text, known, asked = self.random.choice(
            (
                (f"What did {giver} give to {receiver}?", {"giver": giver, "receiver": receiver}, "thing"),
                (f"Who gave the {thing} to {receiver}?", {"thing": thing, "receiver": receiver}, "giver"),
                (f"Who did {giver} give the {thing} to?", {"giver": giver, "thing": thing}, "receiver"),
                (f"Who gave the {thing}?", {"thing": thing}, "giver"),
                (f"Who received the {thing}?", {"thing": thing}, "receiver"),
            )
        )
        given, fact = next((g, i) for g, i in reversed(self.given) if known.items() <= g._asdict().items())
        return Question(text, getattr(given, asked), known.get("thing", giver), (fact,))

    def ask_untold(self) -> Question | None:
        return self._untold(self.random.choice(("Who gave the {}?", "Who received the {}?")))

    def _handlings(self) -> list[tuple[str, str, str]]:
        gives = [
            ("give", holder.value, thing) for thing, holder in self.holder.items() for _ in range(len(self.people) - 1)
        ]
        return super()._handlings() + gives

    def _handle(self, deed: str, person: str, thing: str) -> None:
        if deed != "give":
            return super()._handle(deed, person, thing)
        receiver = self.random.choice([other for other in self.people if other != person])
        # a fact of three: it ends with the receiver, where a model must know the giver and, besides, the thing
        fact = self._say(f"{person} {self.random.choice(GIVE)} the {thing} to {receiver}.", person, thing)
        self.holder[thing] = Known(receiver, (fact,))
        self.given.append((Given(person, thing, receiver), fact))
        return None
