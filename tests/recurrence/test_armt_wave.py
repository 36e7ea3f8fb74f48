"""The memories under way in a wave: a group finds those of its cells, and writes that wait are read all the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor

from tests.support.chunks import chunks, schedules
from tests.support.near import assert_near
from vllm_armt.core import MemoryRule
from vllm_armt.plan.step import Chunk, ClosedSegment, Group, Schedule, Wave, plan_step
from vllm_armt.recurrence.armt_wave import COLLECTED_ROWS, Lanes

S, P, d = 4, 4, 6
K = 6 * P
CPU = torch.device("cpu")
BUFFERS = ("M", "z", "read_M", "k", "r", "read_k", "read_r")
RULES = [MemoryRule(), MemoryRule(normalize=False), MemoryRule(use_denom=False), MemoryRule(heads=2)]


def numbered(wave: Wave, dtype: torch.dtype = torch.float32, heads: int = 1) -> Lanes:
    """Buffers in which every value is its number: layer of the block * width + lane."""
    lanes = Lanes(wave, heads, K, d, 2, dtype, CPU)
    number = torch.arange(float(wave.depth * wave.width)).view(wave.depth, wave.width)
    for name in BUFFERS:
        buffer = getattr(lanes, name)
        buffer.copy_(number.view(*number.shape, *[1] * (buffer.ndim - 2)).expand_as(buffer))
    return lanes


def lane(*documents: int) -> list[ClosedSegment]:
    """Documents of so many segments one behind another."""
    return [
        ClosedSegment(request, s, row=0, enters=s == 0, retained=False)
        for request, length in enumerate(documents)
        for s in range(length)
    ]


def wave_of(step: list[Chunk], schedule: Schedule) -> Wave:
    wave = plan_step(step, schedule).wave
    if wave is None:
        reject()
    return wave


@given(chunks(S), schedules(S), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 2]))
def test_runs_cover_every_cell_of_a_group_once_with_views_of_its_layers_and_lanes_memories(
    step: list[Chunk], schedule: Schedule, dtype: torch.dtype, heads: int
):
    wave = wave_of(step, schedule)
    lanes = numbered(wave, dtype, heads)
    for group in wave.groups(schedule.num_layers):
        runs = lanes.runs(group)
        covered = [cell for run in runs for cell in range(group.cells)[run.cells]]
        assert covered == list(range(group.cells))
        layers = enumerate(group.lanes, group.first_layer)
        numbers = [
            layer % wave.depth * wave.width + i for layer, count in layers for i in range(count) for _ in range(heads)
        ]
        for name in BUFFERS:
            buffer = getattr(lanes, name)
            views = [getattr(run, name) for run in runs]
            assert [int(cell.flatten()[0]) for view in views for cell in view] == numbers
            assert all(view.shape[1:] == buffer.shape[3:] for view in views)
            assert all(view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for view in views)


def test_a_group_that_uses_every_lane_is_one_run():
    wave = Wave([lane(2), lane(2)], depth=2, max_cells=8)
    diagonal = list(wave.groups(2))[1]
    assert diagonal.lanes == (2, 2)
    (run,) = numbered(wave).runs(diagonal)
    assert run.M[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_ragged_group_is_a_run_a_layer():
    wave = Wave([lane(2), lane(1)], depth=2, max_cells=8)
    diagonal = list(wave.groups(2))[1]
    assert diagonal.lanes == (1, 2)
    first, second = numbered(wave).runs(diagonal)
    assert (first.cells, second.cells) == (slice(0, 1), slice(1, 3))
    assert first.M[:, 0, 0].tolist() == [0]
    assert second.z[:, 0].tolist() == [2, 3]


def test_rows_are_read_in_the_dtype_of_products_and_kept_in_float32():
    wave = Wave([lane(1)], depth=1, max_cells=8)
    for dtype in (torch.float32, torch.bfloat16):
        lanes = Lanes(wave, 1, K, d, 2, dtype, CPU)
        assert {x.dtype for x in (lanes.M, lanes.z, lanes.k, lanes.r)} == {torch.float32}
        assert {x.dtype for x in (lanes.read_M, lanes.read_k, lanes.read_r)} == {dtype}


class Reference:
    """Memories of `[depth, width]` that take every write at once, cell by cell, in float64."""

    def __init__(self, rule: MemoryRule, wave: Wave) -> None:
        self.rule = rule
        shape = (wave.depth, wave.width, rule.heads, K // rule.heads)
        self.M = torch.full((*shape, d // rule.heads), torch.nan, dtype=torch.float64)
        self.z = torch.full(shape, torch.nan, dtype=torch.float64)

    def enter(self, at: tuple[int, int], resumed: bool) -> tuple[Tensor | None, Tensor | None]:
        """Begin a document with an empty memory, or with one that is returned."""
        self.M[at], self.z[at] = 0.0, 0.0
        if not resumed:
            return None, None
        k = self.rule.split_heads(self.rule.phi(torch.randn(3, P, dtype=torch.float64)))
        v = self.rule.split_heads(torch.randn(3, d, dtype=torch.float64))
        self.M[at], self.z[at] = k.mT @ v, k.sum(1)
        return self.M[at].float().unsqueeze(0), self.z[at].float().unsqueeze(0)

    def read(self, at: tuple[int, int], q: Tensor) -> Tensor:
        return self.rule.merge_heads(self.rule.read(self.rule.split_heads(q.double()), self.M[at], self.z[at]))

    def write(self, at: tuple[int, int], k: Tensor, v: Tensor, beta: Tensor, first: bool) -> None:
        k, v, beta = (self.rule.split_heads(x.double()) for x in (k, v, beta))
        residual, dz = self.rule.update(k, v, beta, k @ self.M[at], self.z[at], first)
        self.M[at] += k.mT @ residual
        self.z[at] += dz


def cells_of(group: Group, depth: int) -> list[tuple[tuple[int, int], int]]:
    """Of each cell in the order of its rows: layer of the block and lane, and its position."""
    return [
        ((group.first_layer % depth + j, i), group.last_position - j)
        for j, count in enumerate(group.lanes)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("dtype", "products", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 5e-2),
        # as on a CPU without products of bfloat16: only the rows are rounded
        (torch.bfloat16, torch.float32, 5e-3),
    ],
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [1, 8, 12, COLLECTED_ROWS, COLLECTED_ROWS + 1])
@pytest.mark.parametrize("depth", [1, 3])
def test_reads_and_kept_memories_are_as_if_every_write_were_taken_at_once(
    depth: int, m: int, rule: MemoryRule, dtype: torch.dtype, products: torch.dtype, tolerance: float
):
    """Lanes in which documents follow one another, some from a memory on, while other lanes have ended."""
    torch.manual_seed(0)
    wave = Wave([lane(3, 6, 2), lane(7, 1), lane(5)], depth, max_cells=8)
    lanes, reference = Lanes(wave, rule.heads, K, d, m, products, CPU), Reference(rule, wave)
    for buffer in {lanes.M, lanes.z, lanes.read_M}:
        buffer.fill_(torch.nan)
    for group in wave.groups(2 * depth):
        cells, n = cells_of(group, depth), group.cells
        first = torch.zeros(n, dtype=torch.bool)
        for cell, ((inner, i), q) in enumerate(cells):
            segment = wave.lanes[i][q]
            if segment.enters:
                first[cell] = segment.request % 2 == 0
                lanes.enter(inner, torch.tensor([i]), *reference.enter((inner, i), not first[cell]))
        features = rule.phi(torch.randn(n, 5, P)).to(dtype)
        k, v, beta = rule.phi(torch.randn(n, m, P)) / m, torch.randn(n, m, d), torch.rand(n, m, rule.heads)
        x = torch.zeros(n, 5, d, dtype=dtype)
        for run in lanes.runs(group):
            run.read(rule, features[run.cells], x[run.cells])
            run.write(rule, k[run.cells], v[run.cells], beta[run.cells], first[run.cells])
        collected = (lanes.collected(group) + m) % (lanes.writes * m)
        for cell, (at, _) in enumerate(cells):
            assert_near(x[cell], reference.read(at, features[cell]), tolerance)
            reference.write(at, k[cell], v[cell], beta[cell], bool(first[cell]))
            M, z = lanes.memory(at[0], torch.tensor([at[1]]), collected)
            assert_near(M[0], reference.M[at], tolerance)
            assert_near(z[0], reference.z[at], tolerance)


@pytest.mark.parametrize(("m", "writes"), [(1, 32), (10, 3), (32, 1), (100, 1)])
def test_as_many_writes_wait_as_their_rows_have_room(m: int, writes: int):
    wave = Wave([lane(1)], depth=1, max_cells=8)
    assert Lanes(wave, 1, K, d, m, torch.float32, CPU).writes == writes
