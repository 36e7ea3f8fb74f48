"""The wave and the open rows against the sequential reference, over pages whose unwritten bytes are NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.diagonal.reference import HIDDEN, LAYERS, S, is_poisoned, m, poisoned_pages, random_stack, recompute
from vllm_armt.core import MemoryRule, kept_segments
from vllm_armt.diagonal import lanes
from vllm_armt.diagonal.open_index import OpenIndex
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.plan import Chunk, Schedule, plan_step
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.wave import WaveIndex, run_wave

CPU = torch.device("cpu")
SCHEDULES = [
    pytest.param(Schedule("sequential", 1000, LAYERS, S + m), id="depth 1"),
    pytest.param(Schedule("auto", 4 * (S + m), LAYERS, S + m), id="depth 2 with two documents"),
    pytest.param(Schedule("diagonal", 1000, LAYERS, S + m), id="full depth, a lane a document"),
    pytest.param(Schedule("diagonal", 1, LAYERS, S + m), id="full depth, documents in one lane"),
]
RULES = [MemoryRule(normalize=False), MemoryRule(correction=False), MemoryRule(use_denom=False)]


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


@pytest.fixture(scope="module", params=["vllm_cpu", "sdpa"])
def stack(request: pytest.FixtureRequest) -> Stack:
    return random_stack(attention=request.param)


@dataclass(frozen=True)
class Document:
    """A request: the step at which it comes and the end of each of its chunks."""

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
def documents(draw: st.DrawFn) -> Document:
    """A prompt in chunks that end on boundaries, the last one where it likes; then decoded tokens."""
    closed = draw(st.lists(st.integers(1, 3), max_size=3))
    ends = [sum(closed[: i + 1]) * S for i in range(len(closed))]
    prompt = (ends[-1] if ends else 0) + draw(st.integers(0 if ends else 1, 2 * S + 1))
    if not ends or prompt > ends[-1]:
        ends.append(prompt)
    ends += range(prompt + 1, prompt + 1 + draw(st.integers(0, 2 * S)))
    return Document(draw(st.integers(0, 3)), ends)


class Server:
    """Runs documents step by step over poisoned pages, with a page for what is kept and page 0 for the rest."""

    def __init__(self, stack: Stack, requests: list[Document], schedule: Schedule, state_dtype=torch.float32) -> None:
        self.requests, self.schedule = requests, schedule
        segments = max(-(-document.length // S) for document in requests)
        self.table = torch.zeros(len(requests), segments, dtype=torch.int32)
        self.pages = poisoned_pages(1 + self.table.numel(), state_dtype)
        self.free = list(range(self.table.numel(), 0, -1))
        self.stack = dataclasses.replace(stack, pages=self.pages)
        self.inputs = [torch.randn(document.length, HIDDEN) for document in requests]
        self.outputs = [torch.full((document.length, HIDDEN), torch.nan) for document in requests]

    def run(self) -> None:
        for step in range(max(document.arrival + len(document.ends) for document in self.requests)):
            chunks: list[Chunk] = []
            rows: list[Tensor] = []
            for request, document in enumerate(self.requests):
                if span := document.chunk(step):
                    chunks.append(Chunk(request, len(rows), *span))
                    rows += [self.inputs[request][t] for t in range(*span)]
                    self._allocate(request, *span)
            if chunks:
                outputs = self._forward(chunks, torch.stack(rows))
                for c in chunks:
                    self.outputs[c.request][c.start : c.end] = outputs[c.row : c.row + c.end - c.start]

    def _allocate(self, request: int, start: int, end: int) -> None:
        for segment in kept_segments(end, S):
            if segment >= -(-start // S):
                self.table[request, segment] = self.free.pop()

    def _forward(self, chunks: list[Chunk], inputs: Tensor) -> Tensor:
        plan = plan_step(chunks, S, self.schedule)
        outputs = torch.full_like(inputs, torch.nan)
        if plan.wave:
            run_wave(self.stack, WaveIndex.build(plan.wave, LAYERS, False, self.table, CPU), inputs, outputs)
        if plan.tails:
            index = OpenIndex.build(plan.tails, m, self.stack.attention, self.table, CPU)
            run_open(self.stack, index, inputs, outputs)
        return outputs


def check(server: Server) -> None:
    """Outputs and the kept memories agree with the reference; what has no page was not written."""
    for request, document in enumerate(server.requests):
        outputs, memories = recompute(server.stack, server.inputs[request])
        torch.testing.assert_close(server.outputs[request], outputs, rtol=1e-5, atol=1e-5)
        for segment in range(document.length // S):
            if page := int(server.table[request, segment]):
                for pages, (M, z) in zip(server.pages, memories[segment], strict=True):
                    torch.testing.assert_close(pages.M[page], M, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(pages.z[page], z, rtol=1e-5, atol=1e-5)
    assert is_poisoned(server.pages, 0)
    assert all(is_poisoned(server.pages, page) for page in server.free)


def test_the_poison_works():
    assert torch.empty(3).isnan().all()
    assert is_poisoned(poisoned_pages(2), 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(documents(), min_size=1, max_size=4))
def test_any_chunking_of_any_batch_gives_the_sequential_result(
    stack: Stack, schedule: Schedule, requests: list[Document]
):
    torch.manual_seed(0)
    server = Server(stack, requests, schedule)
    server.run()
    check(server)


@pytest.mark.parametrize("rule", RULES)
def test_every_memory_rule_runs_on_the_diagonal_and_in_open_rows(rule: MemoryRule):
    torch.manual_seed(0)
    requests = [
        Document(0, [3 * S, *range(3 * S + 1, 5 * S + 2)]),
        Document(1, [5 * S + 2]),
        Document(0, list(range(1, 2 * S + 2))),
    ]
    # with keys so small the first-segment rule and the epsilons show
    server = Server(random_stack(rule, key_scale=0.1), requests, Schedule("diagonal", 1000, LAYERS, S + m))
    server.run()
    check(server)


def test_a_page_that_held_something_else_before_is_opened_clean(stack: Stack):
    """Two segments of different fill share a batch; the shorter one's stale columns must not spread."""
    torch.manual_seed(0)
    server = Server(stack, [Document(0, [1, 2]), Document(0, [2, 3])], Schedule("auto", 1000, LAYERS, S + m))
    server.run()
    check(server)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_in_bfloat16_pages_is_the_rounded_memory_of_a_step(stack: Stack, schedule: Schedule):
    torch.manual_seed(0)
    server = Server(stack, [Document(0, [3 * S]), Document(0, [2 * S])], schedule, state_dtype=torch.bfloat16)
    server.run()
    for request, segments in enumerate((3, 2)):
        outputs, memories = recompute(stack, server.inputs[request])
        torch.testing.assert_close(server.outputs[request], outputs, rtol=1e-5, atol=1e-5)
        page = int(server.table[request, segments - 1])
        for pages, (M, z) in zip(server.pages, memories[segments - 1], strict=True):
            torch.testing.assert_close(pages.M[page].float(), M, rtol=2**-8, atol=1e-6)
            torch.testing.assert_close(pages.z[page].float(), z, rtol=2**-8, atol=1e-6)


def test_the_memory_matters_to_these_tests(stack: Stack):
    torch.manual_seed(0)
    document = torch.randn(2 * S, HIDDEN)
    with_memory, _ = recompute(stack, document)
    alone, _ = recompute(stack, document[S:])
    assert (with_memory[S:] - alone).norm() > 0.05 * alone.norm()
