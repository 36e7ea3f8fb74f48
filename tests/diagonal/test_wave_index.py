"""The wave's integers, and that every kind of grouped product gives the sequential result."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from tests.diagonal.chunks import chunks, schedules
from tests.diagonal.reference import HIDDEN, LAYERS, S, m, random_stack, recompute
from vllm_armt.diagonal import lanes, stacked
from vllm_armt.diagonal.plan import Chunk, Schedule, plan_step
from vllm_armt.diagonal.wave import WaveIndex, run_wave

CPU = torch.device("cpu")


@given(chunks(S), schedules(), st.booleans(), st.integers(1, 20))
def test_the_rows_of_a_group_are_its_cells_by_layer_and_ragged_ones_end_where_devices_can_use_it(
    step: list[Chunk], schedule: Schedule, has_grouped_product: bool, cell_rows: int
):
    wave = plan_step(step, S, schedule).wave
    if wave is None:
        reject()
    index = WaveIndex.build(wave, schedule.num_layers, has_grouped_product, None, CPU)
    for group in wave.groups(schedule.num_layers):
        rows = index.rows_of(group, cell_rows)
        assert rows.first_layer == group.first_layer
        assert rows.counts == tuple(lanes * cell_rows for lanes in group.lanes)
        if has_grouped_product and not rows.is_uniform:
            assert rows.ends is not None
            assert rows.ends.dtype == torch.int32
            assert rows.ends.tolist() == list(accumulate(rows.counts))
        else:
            assert rows.ends is None


@given(chunks(S), schedules())
def test_rows_are_the_input_rows_of_the_segments_in_buffer_order(step: list[Chunk], schedule: Schedule):
    wave = plan_step(step, S, schedule).wave
    if wave is None:
        reject()
    table = torch.arange(40, dtype=torch.int32).view(5, 8)
    index = WaveIndex.build(wave, schedule.num_layers, False, table, CPU)
    assert index.rows.tolist() == [segment.row for segment in wave.segments()]
    assert index.first.tolist() == [segment.segment == 0 for segment in wave.segments()]
    for q in range(wave.positions):
        column = wave.column(q)
        starting = [(lane, s) for lane, s in enumerate(column) if s.enters]
        entries = index.entries.get(q)
        assert (entries is None) == (not starting)
        if entries is not None:
            assert entries.empty.tolist() == [lane for lane, s in starting if s.segment == 0]
            assert entries.resumed.tolist() == [lane for lane, s in starting if s.segment > 0]
            assert entries.pages.tolist() == [
                int(table[s.request, s.segment - 1]) for _, s in starting if s.segment > 0
            ]
        kept = [(lane, s) for lane, s in enumerate(column) if s.kept]
        snapshots = index.snapshots.get(q)
        assert (snapshots is None) == (not kept)
        if snapshots is not None:
            assert snapshots.lanes.tolist() == [lane for lane, _ in kept]
            assert snapshots.pages.tolist() == [int(table[s.request, s.segment]) for _, s in kept]


@pytest.mark.parametrize("product", ["packed", "batched", "grouped"])
@pytest.mark.parametrize(
    ("mode", "max_cells"), [("diagonal", 100), ("diagonal", 6), ("diagonal", 2), ("auto", 5), ("sequential", 100)]
)
def test_a_wave_gives_the_sequential_result_by_any_kind_of_product(
    product: str, mode: str, max_cells: int, monkeypatch: pytest.MonkeyPatch
):
    """Documents of 4, 2 and 1 segments, so that lanes end at different positions."""
    if product != "packed":
        monkeypatch.setattr(stacked, "_can_pack", lambda: False)
    monkeypatch.setattr(lanes, "COLLECTED_ROWS", 2 * m)
    torch.manual_seed(0)
    stack, lengths = random_stack(), [4 * S, 2 * S, S]
    starts = list(accumulate(lengths, initial=0))
    step = [Chunk(request, starts[request], 0, length) for request, length in enumerate(lengths)]
    wave = plan_step(step, S, Schedule(mode, max_cells * (S + m), LAYERS, S + m)).wave
    assert wave is not None
    index = WaveIndex.build(wave, LAYERS, product == "grouped", None, CPU)
    inputs = torch.randn(starts[-1], HIDDEN)
    outputs = torch.full_like(inputs, torch.nan)
    run_wave(stack, index, inputs, outputs)
    expected = torch.cat([recompute(stack, document)[0] for document in inputs.split(lengths)])
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
