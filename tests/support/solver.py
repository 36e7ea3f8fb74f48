"""Answers questions from the sentences alone: a reader of bAbI's English that shares no code with the generator."""

from __future__ import annotations

import re

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
TAKES = {"got", "grabbed", "took", "picked"}
DROPS = {"discarded", "dropped", "left", "put"}


def groups(pattern: str, text: str) -> tuple[str, ...]:
    """What a pattern finds in a text that it must match."""
    found = re.fullmatch(pattern, text)
    assert found, f"no reading of {text!r}"
    return found.groups()


def solve(facts: list[str], question: str) -> str | None:
    """The answer, or None if the facts do not say."""
    if question.startswith("What is "):
        return _direction(facts, question)
    if re.match(r"(\w( \w)*)\?", question):
        values = [fact.split(": ")[1].rstrip(".") for fact in facts if fact.startswith(question[:-1] + ":")]
        return values[-1] if values else None
    return _people(facts, question)


def _direction(facts: list[str], question: str) -> str | None:
    relations = set()
    for fact in facts:
        a, direction, b = groups(r"The (\w+) is (\w+) of the (\w+)\.", fact)
        relations |= {(a, direction, b), (b, OPPOSITE[direction], a)}
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        answers = {a for a, direction, b in relations if (direction, b) == found.groups()}
    else:
        place, wanted = groups(r"What is the (\w+) (\w+) of\?", question)
        answers = {b for a, direction, b in relations if (a, direction) == (place, wanted)}
    assert len(answers) <= 1, "the facts contradict each other"
    return answers.pop() if answers else None


def _people(facts: list[str], question: str) -> str | None:
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    track: dict[str, list[str]] = {}
    given: list[tuple[str, str, str]] = []
    for fact in facts:
        words = fact.rstrip(".").removesuffix(" there").split()
        person, verb, last = words[0], words[1], words[-1]
        if "to" in words and words[words.index("to") + 1] == "the":
            place[person] = last
        elif "to" in words:
            thing = words[3]
            given.append((person, thing, last))
            holder[thing] = last
        elif verb in TAKES:
            holder[last] = person
        else:
            assert verb in DROPS, fact
            holder.pop(last, None)
            if person in place:
                _visit(track, last, place[person])
        for thing, person_with_it in holder.items():
            if person_with_it in place:
                _visit(track, thing, place[person_with_it])
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return track[found[1]][-1] if found[1] in track else None
    if found := re.fullmatch(r"Where is (\w+)\?", question):
        return place.get(found[1])
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        stops = track[found[1]]
        came = max((i for i, stop in enumerate(stops) if stop == found[2]), default=0)
        return stops[came - 1] if came else None
    patterns = {
        r"What did (?P<giver>\w+) give to (?P<receiver>\w+)\?": 1,
        r"Who gave the (?P<thing>\w+) to (?P<receiver>\w+)\?": 0,
        r"Who did (?P<giver>\w+) give the (?P<thing>\w+) to\?": 2,
        r"Who gave the (?P<thing>\w+)\?": 0,
        r"Who received the (?P<thing>\w+)\?": 2,
    }
    for pattern, asked in patterns.items():
        if found := re.fullmatch(pattern, question):
            wanted = found.groupdict()
            roles = [dict(zip(("giver", "thing", "receiver"), one, strict=True)) for one in given]
            fitting = [one for one, role in zip(given, roles, strict=True) if wanted.items() <= role.items()]
            return fitting[-1][asked] if fitting else None
    raise AssertionError(f"no reading of {question!r}")


def _visit(track: dict[str, list[str]], thing: str, place: str) -> None:
    stops = track.setdefault(thing, [])
    if not stops or stops[-1] != place:
        stops.append(place)
