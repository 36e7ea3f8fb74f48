"""Steps that are captured and replayed give what they give run by run.

What a graph repeats on CPUs is the same calls on the same tensors; on a GPU it is the kernels that they launched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.support.cpu_graphs import CPUGraphs
from tests.support.executor_server import Server, legal, schedule_of
from tests.support.random_models import CONFIGS, S, random_model
from vllm_armt.executor import cuda_graphs
from vllm_armt.executor.cuda_graphs import GraphedTails
from vllm_armt.executor.tails import TailMetadata, run_tails


class ReplayingServer(Server):
    """Its tails go through a `GraphedTails`."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.capture = CPUGraphs(self.pool.restored)
        self.graphed = GraphedTails(self._outputs, self.capture)

    def run_tails(self, index: TailMetadata, inputs: Tensor, outputs: Tensor) -> None:
        replayed = self.graphed(index, inputs)
        outputs[index.out_rows] = replayed[index.out_rows]

    def _outputs(self, index: TailMetadata, inputs: Tensor) -> Tensor:
        outputs = torch.zeros_like(inputs)
        run_tails(self.parts, index, inputs, outputs)
        return outputs


@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_are_replayed_over_segments_and_beside_other_requests(name: str):
    torch.manual_seed(0)
    model = random_model(CONFIGS[name], "sdpa")
    requests = [
        legal(model, S + 1, *range(S + 1, 9 * S)),
        legal(model, 2 * S, *range(2 * S, 9 * S), arrival=1),
        legal(model, 1, *range(1, 6 * S), arrival=2),
    ]
    server = ReplayingServer(model, requests, schedule_of(model, "auto"))
    server.run()
    assert 2 <= server.capture.captured < server.capture.replayed


def test_what_comes_once_is_not_captured_and_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 1)
    torch.manual_seed(0)
    model = random_model(CONFIGS["armt"], "sdpa")
    server = ReplayingServer(model, [legal(model, 1, 1, 2, 3)], schedule_of(model, "auto"))
    server.run()
    # a first token has no past; the second and the third look at equally many columns
    assert (server.capture.captured, server.capture.replayed) == (1, 1)
    server = ReplayingServer(model, [legal(model, 1, *range(1, 8 * S))], schedule_of(model, "auto"))
    server.run()
    assert len(server.graphed.graphs) == 1
    assert server.capture.captured > 1


@contextmanager
def collected_at_every_chance() -> Iterator[list[str]]:
    """Garbage is collected after every few allocations; the phases of each collection."""
    phases: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        phases.append(phase)

    threshold, was_enabled = gc.get_threshold(), gc.isenabled()
    gc.callbacks.append(note)
    gc.set_threshold(1, 1, 1)
    gc.enable()
    try:
        yield phases
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)
        if not was_enabled:
            gc.disable()


def make_garbage() -> None:
    for _ in range(100):
        garbage: list = []
        garbage.append(garbage)


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_a_step_is_captured(fails: bool):
    during: list[int] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        begun = len(phases)
        output = run()
        make_garbage()
        during.append(len(phases) - begun)
        if fails:
            raise RuntimeError("out of memory")
        return lambda: None, output

    x = torch.zeros(1)
    with collected_at_every_chance() as phases:
        runs = GraphedTails(lambda metadata, inputs: inputs + 1, capture)
        runs(None, x)  # type: ignore[arg-type]
        try:
            runs(None, x)  # type: ignore[arg-type]
        except RuntimeError:
            assert fails
        assert during == [0]
        before = len(phases)
        make_garbage()
        assert len(phases) > before
