"""Steps of decodes as CUDA graphs: launching their kernels one by one takes longer than running them.

What such a step launches follows from the shapes of its metadata and inputs alone, because nothing on the step path
looks at values. So steps of equal shapes share a graph, into whose tensors each copies its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.utils.cache import LRUCache

from vllm_armt.executor.tails import TailMetadata

Run = Callable[[TailMetadata[Any], Tensor], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes what to run, and gives what repeats it on the same tensors, and its output."""

GRAPHS = 64
"""Kept at most, those used last; each holds some hundreds of kernel launches."""

SEEN = 1024
"""Shapes, those met last, that are captured when they come again: many never do."""


class GraphedTails:
    """Runs tails: as they come the first time, captured the second, and replayed from then on.

    The output is overwritten by the next step of the same shapes.

    Args:
        run: what turns the metadata of a step's tails and inputs `[tokens, d]` into outputs; it must do the same for
            all of equal shapes.
        capture: how, on a device.
    """

    def __init__(self, run: Run, capture: Capture) -> None:
        self.run = run
        self.capture = capture
        self.seen: LRUCache[Any, bool] = LRUCache(SEEN)
        self.graphs: LRUCache[Any, _Graph] = LRUCache(GRAPHS)

    def __call__(self, metadata: TailMetadata[Any], inputs: Tensor) -> Tensor:
        """`[tokens, d]`, what `run` gives."""
        shapes = _shapes(metadata), inputs.shape
        if shapes not in self.seen:
            self.seen[shapes] = True
            return self.run(metadata, inputs)
        tensors = [*_tensors(metadata), inputs]
        graph = self.graphs.get(shapes)
        if graph is None:
            graph = self.graphs[shapes] = _Graph(self.run, self.capture, metadata, inputs)
        return graph(tensors)


class _Graph:
    """One step's launches on tensors of their own."""

    def __init__(self, run: Run, capture: Capture, metadata: TailMetadata[Any], inputs: Tensor) -> None:
        # the step's tensors are its own: nothing else changes them
        self.tensors = [*_tensors(metadata), inputs.clone()]
        with _no_collection():
            self.replay, self.output = capture(lambda: run(metadata, self.tensors[-1]))

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        torch._foreach_copy_(self.tensors, tensors)
        self.replay()
        return self.output


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is collected meanwhile: a collection can spoil a capture, as where it unloads a Triton kernel.

    vLLM's `freeze_gc_for_cudagraph_capture` is for start-up. While serving, its two collections of the whole heap would
    stop all requests for 0.4 s each, and it would thaw what vLLM has frozen for good.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CUDAGraphCapture:
    """Captures on CUDA; all graphs share one pool of memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            # other threads may go on: vLLM copies outputs to the host meanwhile
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph.replay, output


def _shapes(value: Any) -> Any:
    """All of the metadata that decides what is launched: hashable."""
    if isinstance(value, Tensor):
        return value.shape
    if is_dataclass(value):
        return type(value), *(_shapes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    assert value is None or isinstance(value, int)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of the metadata, always in the same order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
