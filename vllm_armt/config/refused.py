"""How what can't be opened is refused: in sentences, all of them at once, whoever found the fault."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

LONGEST = 400
"""Characters that are repeated of a library's own words."""


class Refused(ValueError):
    """What was given can't be opened, for these reasons.

    Args:
        reasons: sentences that name what was given, what is allowed and what to do.
    """

    def __init__(self, *reasons: str):
        super().__init__(*reasons)
        self.reasons = list(reasons)

    def __str__(self) -> str:
        return " ".join(self.reasons)


@contextmanager
def translated(what: str, *, quoting: bool = True) -> Iterator[None]:
    """Make one sentence of any error of a library that reads or builds something of what a stranger wrote.

    This is the one place where errors of transformers, torch, safetensors, pickle and json become ours: what they
    raise on damaged input is any class at all. An OSError (a full disk, no permission) passes as it is.

    Args:
        what: begins the sentence: what can't be done, and with which file or field.
        quoting: whether it ends in the library's own words.

    Raises:
        Refused: something failed; its cause is the library's error.
    """
    try:
        yield
    except (Refused, OSError):
        raise
    except Exception as error:
        if not quoting:
            raise Refused(f"{what}.") from error
        # huggingface_hub's strict dataclasses say what is wrong in the cause alone
        said = first_words(error.__cause__ if isinstance(error, StrictDataclassError) else error)
        if not isinstance(error, ValueError | StrictDataclassError):
            said = f"{type(error).__name__}: {said}"
        raise Refused(f"{what}: {said}{'' if said.endswith('.') else '.'}") from error


def first_words(error: BaseException | None) -> str:
    """What an error of a library says, as part of a line."""
    return " ".join(str(error).split())[:LONGEST]


def shown(value: Any) -> str:
    """A value as a message repeats it: short, whatever was given."""
    return reprlib.repr(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ValueError: it is not; the message lists them.
    """
    if value not in allowed:
        raise Refused(not_one_of(name, value, allowed))


def not_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The sentence that refuses a value that is not among those allowed."""
    return f"`{name}` is {shown(value)}; allowed: {', '.join(map(repr, allowed))}."
