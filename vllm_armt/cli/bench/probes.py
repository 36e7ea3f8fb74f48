"""Wrapping callables of vLLM and of ours from outside, for as long as something is measured."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine

Probe = tuple[str, Any, str]
"""What a callable counts as, the object or class that has it, and its name there."""


def planning_probes(engine: Engine) -> list[Probe]:
    """What decides about a step before it runs, and takes note of it afterwards."""
    scheduler = engine.core.scheduler
    return [
        ("scheduling", scheduler, "schedule"),
        ("scheduling", scheduler, "update_from_output"),
        ("planning", engine.builder, "build"),
    ]


@contextmanager
def wrapped(
    probes: Sequence[Probe], wrapper: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put `wrapper(what, callable)` in the place of every callable, and put things back afterwards.

    Raises:
        AttributeError: an owner has no such callable.
    """
    originals = []
    for what, owner, name in probes:
        original = getattr(owner, name)
        originals.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wraps(original)(wrapper(what, original)))
    try:
        yield
    finally:
        for owner, name, original in reversed(originals):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextmanager
def seconds(probes: Sequence[Probe]) -> Iterator[dict[str, float]]:
    """The host's seconds in the probed callables, by what they count as."""
    spent: dict[str, float] = defaultdict(float)

    def timed(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - begin

        return run

    with wrapped(probes, timed):
        yield spent
