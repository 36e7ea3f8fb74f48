"""What the operators of a run count as: projections, attention, memory, elementwise, or the engine around them.

torch's profiler says which operator took how long and inside of which range it ran; ranges are put around
callables of vLLM and of ours, from outside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from vllm_armt.cli.bench.probes import Probe, planning_probes, wrapped
from vllm_armt.core import MemoryRule
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.recurrence.armt import ARMTRecurrence, ARMTWaveState
from vllm_armt.recurrence.armt_projections import MemoryProjections

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine

PARTS = {
    "projections": "projections",
    "attention": "attention",
    "memory": "memory read and write",
    "elementwise": "elementwise and copies",
    "host": "Python between operators",
    "scheduling": "scheduling and planning",
    "head": "head and sampling",
    "engine": "rest of the engine",
}

PREFIX = "vllm_armt bench: "
"""Of the names of our ranges."""

PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "linear", "embedding_bag", "onednn_mm"}
"""Operators that multiply matrices. In the model and outside of all other ranges they read or update a memory."""


def _ranges(engine: Engine) -> list[Probe]:
    """What the callables count as; where they are nested, the outermost counts, "model" only if there is no other."""
    model, attention = engine.runner.model, type(engine.runner.model.attention)
    return [
        ("model", model, "forward"),
        ("projections", StackedLinear, "forward"),
        ("attention", attention, "attend_cells"),
        ("attention", attention, "attend_tails"),
        ("memory", ARMTRecurrence, "before_tails"),
        ("memory", ARMTRecurrence, "after_tails"),
        ("memory", MemoryProjections, "queries"),
        ("memory", MemoryProjections, "writes"),
        ("memory", MemoryRule, "weights"),
        ("memory", MemoryRule, "update"),
        ("memory", ARMTWaveState, "_enter"),
        ("memory", ARMTWaveState, "_keep"),
        ("head", model, "compute_logits"),
        ("head", engine.runner, "sample_tokens"),
        *(("scheduling", owner, name) for _, owner, name in planning_probes(engine)),
    ]


def shares(engine: Engine, run: Callable[[], float]) -> tuple[dict[str, float], float]:
    """The share of each of `PARTS` in the time of `run`, and the seconds that `run` says it took.

    Raises:
        AttributeError: a callable of `_ranges` is gone.
    """
    on_device = torch.accelerator.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with wrapped(_ranges(engine), _in_range), torch.profiler.profile(activities=activities) as profiler:
        seconds = run()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[_part(event)] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
    # what no event covers: the loop around the engine, and on a GPU all that the device waits for
    spent["engine"] += max(0.0, seconds - sum(spent.values()))
    total = sum(spent.values())
    return {part: spent[part] / total for part in PARTS}, seconds


def _in_range(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + what):
            return call(*args, **kwargs)

    return run


def _part(event: FunctionEvent) -> str:
    """Which of `PARTS` the event's own time belongs to."""
    ranges = list(_enclosing(event))
    inner = [what for what in ranges if what != "model"]
    if inner:
        return inner[-1]
    if not ranges:
        return "engine"
    if event.name.startswith(PREFIX):
        return "host"
    return "memory" if any(name in PRODUCTS for name in _operators(event)) else "elementwise"


def _enclosing(event: FunctionEvent | None) -> Iterator[str]:
    """Our ranges around an event, innermost first."""
    while event is not None:
        if event.name.startswith(PREFIX):
            yield event.name.removeprefix(PREFIX)
        event = event.cpu_parent


def _operators(event: FunctionEvent | None) -> Iterator[str]:
    """The event's name and those around it up to the next range, without namespaces."""
    while event is not None and not event.name.startswith(PREFIX):
        yield event.name.split("::")[-1]
        event = event.cpu_parent
