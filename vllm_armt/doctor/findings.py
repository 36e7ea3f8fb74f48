"""What a look at something has found, and mending it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong", "mended"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what it is.
        state: "ok", a "note" that prevents nothing, "wrong", or what was wrong and is "mended".
        said: a sentence; of what is wrong, with what to do.
        mend: puts it right and says what it did; None where nobody but the user can.
    """

    about: str
    state: State
    said: str
    mend: Callable[[], str] | None = None


def mended(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings, each that can be mended after it was: with what was done, or why it could not be."""
    for finding in findings:
        if finding.state != "wrong" or finding.mend is None:
            yield finding
            continue
        try:
            yield Finding(finding.about, "mended", finding.mend())
        except (OSError, RuntimeError) as error:
            yield Finding(finding.about, "wrong", f"{finding.said} That could not be mended: {error}")


def looked(about: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a look finds; that it ends in an error is a finding, too, as it is the environment that is looked at."""
    try:
        yield from look()
    except Exception as error:
        said = " ".join(str(error).split())
        yield Finding(about, "wrong", f"{said or type(error).__name__}{'' if said.endswith('.') else '.'}")
