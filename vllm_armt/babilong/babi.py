"""bAbI's own stories, from its files (`qa1_single-supporting-fact_test.txt` and the rest)."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_armt.babilong.episodes import Fact, Question
from vllm_armt.babilong.stories import Story, Task

_LINE = re.compile(r"(\d+) ([^\t]+?) *(?:\t *([^\t]+?) *\t *([\d ]+))?")
"""A number, a sentence and, behind a question, its answer and the numbers of the facts that it follows from."""


class Babi:
    """Tells the stories of a directory; one for each question, with all facts before it.

    Args:
        directory: with a file `qaN_*_test.txt` of each task that is asked.
        names: of the tasks.

    Raises:
        ValueError: a task has no file, or a file has a line that is none of bAbI's.
    """

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.stories = {name: stories_of(_file(directory, name)) for name in names}

    def __call__(self, task: Task, index: int, facts: int | None) -> Story:
        """The story `index`, beginning anew behind the last; one of so many facts if that is asked for.

        Raises:
            ValueError: none has so many facts.
        """
        told = self.stories[task.name]
        if facts is not None:
            told = [one for one in told if len(one.facts) == facts]
            if not told:
                raise ValueError(f"No story of {task.name} in these files has {facts} facts.")
        return told[index % len(told)]


def has_files(directory: Path) -> bool:
    """Whether a directory has files of bAbI."""
    return any(directory.glob("qa*_*_test.txt"))


def stories_of(file: Path) -> list[Story]:
    """The stories of a file, in its order.

    Raises:
        ValueError: a line is none of bAbI's.
    """
    found: list[Story] = []
    facts: dict[int, Fact] = {}
    for i, line in enumerate(file.read_text().splitlines(), 1):
        match = _LINE.fullmatch(line.strip("\r\n "))
        if not match:
            raise ValueError(f"{file}, line {i}: {line!r} is no line of bAbI; expected is `1 A fact.`, or a question.")
        number, text = int(match[1]), match[2]
        if number == 1:
            facts = {}
        if match[3] is None:
            facts[number] = Fact(text, text.split()[0])
            continue
        order = list(facts)
        supports = [int(word) for word in match[4].split()]
        if missing := set(supports) - set(order):
            raise ValueError(f"{file}, line {i}: the question follows from {missing}, which is no fact before it.")
        about = re.findall(r"\w+", text)[-1]
        question = Question(text, match[3], about, tuple(sorted(order.index(support) for support in supports)))
        found.append(Story(tuple(facts.values()), question))
    return found


def _file(directory: Path, name: str) -> Path:
    files = sorted(directory.glob(f"{name}_*_test.txt"))
    if len(files) != 1:
        there = ", ".join(sorted(file.name for file in directory.glob("qa*_test.txt"))) or "none"
        raise ValueError(
            f"{directory} has {len(files)} files {name}_*_test.txt, and one is needed; there are: {there}."
        )
    return files[0]
