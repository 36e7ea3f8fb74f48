"""What trips a model that has learnt one form by heart: kinds of texts as people write them, in `hard.json`.

`vllm-armt babilong --hard` asks samples of each. An entry says in what its samples differ from plain ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_armt.babilong.stories import Task

FILE = Path(__file__).with_name("hard.json")


@dataclass(frozen=True)
class Kind:
    """In what samples differ from plain ones.

    Attributes:
        form: of the facts, a key of `forms.FACTS`.
        question: form of the question, a key of `forms.QUESTIONS`; None for the prompt's.
        prompt: a name of a prompt, as `--prompt` takes it; None for the run's.
        opens: whether the first fact begins the text.
        facts: how many.
        reworded: whether facts have other verbs than bAbI's, those of the test part.
        then: a kind of `distractors`; one about the person who is asked for stands behind all facts.
        mentions: for every 1,000 tokens, of all kinds; None for as many as are asked for.
        untold: whether somebody is asked for of whom nothing was told; then the answer is "unknown".
    """

    form: str = "inline"
    question: str | None = None
    prompt: str | None = None
    opens: bool = False
    facts: int | None = None
    reworded: bool = False
    then: str | None = None
    mentions: float | None = None
    untold: bool = False


PLAIN = Kind()


@cache
def kinds(file: Path = FILE) -> dict[str, Kind]:
    """The kinds of a file, by name."""
    return {name: Kind(**entry) for name, entry in json.loads(file.read_text()).items()}


def kinds_of(task: Task) -> list[str]:
    """Names of the kinds that a task has samples of: stories of always as many facts come in no other length."""
    least, most = task.facts
    return [name for name, kind in kinds().items() if least < most or kind.facts in (None, 0, most)]
