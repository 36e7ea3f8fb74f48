"""The wave and the open rows against the sequential reference, over pages whose unwritten bytes are NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.diagonal.chunks import MODES, furthest_end
from tests.diagonal.model import ARMT, CONFIGS, CPU, LAYERS, ON_LLAMA, Model, Pool, S, m, random_model
from tests.diagonal.near import assert_near
from tests.diagonal.reference import State, random_document
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal.open_index import OpenIndex
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.plan import Chunk, Schedule, plan_step
from vllm_armt.diagonal.systems import lanes
from vllm_armt.diagonal.wave import run_wave
from vllm_armt.diagonal.wave_index import WaveIndex

MANY = 1000
"""Cells of a grouped forward, more than there are."""


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Tensors that are made without a value are NaN, so that one read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_writes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories take three writes at a time, so that documents of few segments see all that can happen."""
    monkeypatch.setattr(lanes, "COLLECTED_ROWS", 3 * m)


@cache
def model_of(name: str, backend: str = "auto") -> Model:
    return random_model(CONFIGS[name], backend)


def backends(name: str) -> list[str]:
    """Those of attention that a configuration can have on CPUs."""
    return ["sdpa"] if CONFIGS[name].window else ["sdpa", "vllm_cpu"]


@dataclass(frozen=True)
class Document:
    """A request: its prompt's tokens, the step at which it comes and the end of each of its chunks."""

    prompt: int
    arrival: int
    ends: list[int]

    @property
    def length(self) -> int:
        return self.ends[-1]

    def chunk(self, step: int) -> tuple[int, int] | None:
        """Start and end of what it computes in a step."""
        i = step - self.arrival
        return ([0, *self.ends][i], self.ends[i]) if 0 <= i < len(self.ends) else None


@st.composite
def documents(draw: st.DrawFn, model: Model) -> Document:
    """A text in any legal chunks. Beyond the prompt they are single tokens, or longer after a preemption."""
    prompt, generated = draw(st.integers(1, 5 * S)), draw(st.integers(0, 2 * S + 1))
    segmentation, length, ends = model.config.segmentation(prompt), prompt + generated, [0]
    while ends[-1] < length:
        furthest = furthest_end(segmentation, S, ends[-1], length)
        ends.append(draw(st.one_of(st.just(furthest), st.integers(ends[-1] + 1, furthest))))
    return Document(prompt, draw(st.integers(0, 3)), ends[1:])


class Server:
    """Runs documents step by step, with poisoned pages for what is kept and page 0 for the rest."""

    def __init__(self, model: Model, requests: list[Document], schedule: Schedule) -> None:
        self.requests, self.schedule = requests, schedule
        self.segmentations = [model.config.segmentation(document.prompt) for document in requests]
        columns = max(
            segmentation.kept(document.length, S).stop
            for segmentation, document in zip(self.segmentations, requests, strict=True)
        )
        self.table = torch.zeros(len(requests), columns, dtype=torch.int32)
        self.pool = Pool(model.layout, 1 + self.table.numel())
        self.free = list(range(1, 1 + self.table.numel()))
        self.stack = dataclasses.replace(model.stack, pages=self.pool.layers)
        self.texts = [
            random_document(model, document.length, segmentation)
            for document, segmentation in zip(requests, self.segmentations, strict=True)
        ]
        """Of each request, its embeddings and what the reference says of them."""

    def run(self, tolerance: float = 1e-4) -> None:
        """Compute everything, and compare outputs and kept state with the reference after every step.

        State may differ by `tolerance`.
        """
        for step in range(max(document.arrival + len(document.ends) for document in self.requests)):
            chunks = self._chunks(step)
            if not chunks:
                continue
            inputs = torch.cat([self.texts[c.request][0][c.start : c.end] for c in chunks])
            outputs = self._forward(chunks, inputs)
            for c in chunks:
                _, expected, states = self.texts[c.request]
                assert_near(outputs[c.row : c.row + c.end - c.start], expected[c.start : c.end])
                self._release(c)
                self._check_pages(c, states, tolerance)
            assert self.pool.is_poisoned(0)
            assert all(self.pool.is_poisoned(page) for page in self.free)

    def _chunks(self, step: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        row = 0
        for request, document in enumerate(self.requests):
            if (span := document.chunk(step)) is None:
                continue
            chunks.append(Chunk(request, row, *span, self.segmentations[request]))
            row += span[1] - span[0]
            for column in self._kept(chunks[-1]):
                if self.table[request, column] == 0:
                    self.table[request, column] = self.free.pop()
        return chunks

    def _kept(self, chunk: Chunk) -> list[int]:
        return [column for column in chunk.segmentation.kept(chunk.end, S) if column >= 0]

    def _forward(self, chunks: list[Chunk], inputs: Tensor) -> Tensor:
        plan = plan_step(chunks, self.schedule)
        outputs = torch.full_like(inputs, torch.nan)
        if plan.wave:
            run_wave(self.stack, WaveIndex.build(plan.wave, LAYERS, False, self.table, CPU), inputs, outputs)
        if plan.tails:
            attention, system = self.stack.attention, self.stack.system
            index = OpenIndex.build(plan.tails, self.stack.cell, attention, system, self.table, CPU)
            run_open(self.stack, index, inputs, outputs)
        return outputs

    def _release(self, chunk: Chunk) -> None:
        """Take back the pages that the next chunk does not read."""
        kept = self._kept(chunk)
        for column, page in enumerate(self.table[chunk.request].tolist()):
            if page and column not in kept:
                self.table[chunk.request, column] = 0
                self.pool.poison(page)
                self.free.append(page)

    def _check_pages(self, chunk: Chunk, states: list[State], tolerance: float) -> None:
        closed = sum(piece.closes for piece in chunk.segmentation.split(0, chunk.end))
        for column in self._kept(chunk):
            if column < closed:
                page = int(self.table[chunk.request, column])
                for pages, state in zip(self.pool.layers, states[column], strict=True):
                    for name, expected in state.items():
                        assert_near(pages.state[name][page], expected, tolerance)


def schedule_of(model: Model, mode: str, max_cells: int = MANY) -> Schedule:
    cell = model.stack.cell
    return Schedule(mode, max_cells * cell.rows, LAYERS, cell.tokens, cell.rows, model.stack.system.flow)


def test_the_poison_works():
    assert torch.empty(3).isnan().all()
    pool = Pool(random_model(CONFIGS["armt"]).layout, 2)
    assert all(view[1].isnan().all() for pages in pool.layers for view in (pages.k, pages.v, *pages.state.values()))
    assert pool.is_poisoned(1)
    pool.layers[1].state["M"][1, 0, 0] = 0
    assert not pool.is_poisoned(1)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunking_of_any_batch_on_any_schedule_gives_the_sequential_result(name: str, data: st.DataObject):
    torch.manual_seed(0)
    model = model_of(name, data.draw(st.sampled_from(backends(name))))
    requests = data.draw(st.lists(documents(model), min_size=1, max_size=4))
    schedule = schedule_of(model, data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from([1, 2, 4, 7, MANY])))
    Server(model, requests, schedule).run()


def legal(model: Model, prompt: int, *stops: int, arrival: int = 0) -> Document:
    """A text that is read in as long chunks as are legal, up to each of some stops."""
    segmentation, ends = model.config.segmentation(prompt), [0]
    for stop in stops:
        while ends[-1] < stop:
            ends.append(furthest_end(segmentation, S, ends[-1], stop))
    return Document(prompt, arrival, ends[1:])


@pytest.mark.parametrize(
    ("mode", "max_cells"),
    [
        pytest.param("sequential", MANY, id="a layer at a time"),
        pytest.param("sequential", 2, id="a layer at a time, documents in two lanes"),
        pytest.param("auto", 8, id="two layers at a time"),
        pytest.param("diagonal", MANY, id="diagonals, a lane a document"),
        pytest.param("diagonal", 2 * LAYERS, id="diagonals, documents in two lanes"),
        pytest.param("diagonal", 2, id="diagonals in parts, documents in one lane"),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_of_many_lengths_share_the_lanes_and_go_on_from_pages(name: str, mode: str, max_cells: int):
    """Some have fewer segments than the model has layers."""
    torch.manual_seed(0)
    model = model_of(name)
    requests = [
        legal(model, 7 * S, 5 * S, 7 * S),
        legal(model, 2 * S + 1, 2 * S + 1),
        legal(model, 3 * S + 2, S, 3 * S + 2, 4 * S + 1),
        legal(model, 5 * S, 4 * S, 5 * S),
        legal(model, 2 * S, 2 * S, arrival=1),
    ]
    Server(model, requests, schedule_of(model, mode, max_cells)).run()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name, config in CONFIGS.items()
        if config.generation_policy == "open"
        for backend in backends(name)
    ],
)
def test_a_segment_that_stays_open_goes_on_over_several_pages(name: str, backend: str):
    """In single tokens, and in longer chunks as after a preemption; beside one that is still in its first page."""
    torch.manual_seed(0)
    model = model_of(name, backend)
    assert model.layout.columns == 32
    requests = [
        legal(model, 3 * S - 1, 3 * S - 1, *range(3 * S + 20, 3 * S + 30), 3 * S + 75, 3 * S + 76),
        legal(model, S, S, *range(S + 1, 3 * S)),
    ]
    Server(model, requests, schedule_of(model, "auto")).run()


@pytest.mark.parametrize("mode", MODES)
def test_the_first_segment_rule_and_the_epsilons_of_small_keys(mode: str):
    torch.manual_seed(0)
    model = random_model(CONFIGS["armt v1"], key_scale=0.02)
    requests = [
        legal(model, 1, 3 * S, *range(3 * S + 1, 5 * S + 2)),
        legal(model, 1, 5 * S + 2, arrival=1),
        legal(model, 1, *range(1, 2 * S + 2)),
    ]
    Server(model, requests, schedule_of(model, mode)).run()


@pytest.mark.parametrize("backend", ["sdpa", "vllm_cpu"])
def test_a_page_that_held_something_else_before_is_opened_clean(backend: str):
    """Two segments of different fill share a batch; the shorter one's stale columns must not spread."""
    torch.manual_seed(0)
    model = model_of("armt", backend)
    Server(model, [legal(model, 1, 1, 2), legal(model, 2, 2, 3)], schedule_of(model, "auto")).run()


@pytest.mark.parametrize("mode", MODES)
def test_memory_in_bfloat16_pages_is_the_rounded_memory_of_a_step(mode: str):
    torch.manual_seed(0)
    model = random_model(ARMTConfig(**ON_LLAMA, **ARMT, state_dtype="bfloat16"))
    server = Server(model, [legal(model, 1, 3 * S), legal(model, 1, 2 * S)], schedule_of(model, mode))
    server.run(tolerance=2**-8)
    assert {pages.state["M"].dtype for pages in server.pool.layers} == {torch.bfloat16}
