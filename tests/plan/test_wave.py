"""The wave's integers, and that every GEMM backend gives the sequential result."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from tests.support.chunks import chunks, schedules
from tests.support.grouped import multiplied_by
from tests.support.near import assert_near
from tests.support.random_models import CONFIGS, CPU, LAYERS, S, m, random_model
from tests.support.reference import random_document
from vllm_armt.executor.wave import run_wave
from vllm_armt.linear.base import Gemm
from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.grouped import GroupedGemm
from vllm_armt.linear.onednn import OneDNNGemm
from vllm_armt.plan.step import Chunk, Schedule, Wave, plan_step
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence import armt_wave as lanes


def wave_of(step: list[Chunk], schedule: Schedule) -> Wave:
    wave = plan_step(step, schedule).wave
    if wave is None:
        reject()
    return wave


@given(chunks(S), schedules(S), st.booleans(), st.integers(1, 20))
def test_the_rows_of_a_group_are_its_cells_by_layer_and_ragged_ones_end_where_devices_can_use_it(
    step: list[Chunk], schedule: Schedule, has_grouped_mm: bool, cell_rows: int
):
    wave = wave_of(step, schedule)
    index = WaveMetadata.build(wave, schedule.num_layers, has_grouped_mm, None, CPU)
    for group in wave.groups(schedule.num_layers):
        rows = index.rows_of(group, cell_rows)
        assert rows.first_layer == group.first_layer
        assert rows.counts == tuple(lanes * cell_rows for lanes in group.lanes)
        if has_grouped_mm and not rows.is_uniform:
            assert rows.ends is not None
            assert rows.ends.dtype == torch.int32
            assert rows.ends.tolist() == list(accumulate(rows.counts))
        else:
            assert rows.ends is None


@given(chunks(S), schedules(S))
def test_the_layers_of_a_group_have_their_places_in_the_buffers_of_a_block(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    index = WaveMetadata.build(wave, schedule.num_layers, False, None, CPU)
    for group in wave.groups(schedule.num_layers):
        for i, (layer, inner, q) in enumerate(index.layers_of(group)):
            assert (layer, q) == (group.first_layer + i, group.last_position - i)
            assert (inner, layer - inner) == (layer % wave.depth, layer // wave.depth * wave.depth)


@given(chunks(S), schedules(S))
def test_integers_are_those_of_the_segments_in_buffer_order(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    table = torch.arange(60, dtype=torch.int32).view(5, 12)
    index = WaveMetadata.build(wave, schedule.num_layers, False, table, CPU)
    assert index.rows.tolist() == [segment.row for segment in wave.segments()]
    assert index.numbers.tolist() == [segment.segment for segment in wave.segments()]
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
        retained = [(lane, s) for lane, s in enumerate(column) if s.retained]
        snapshots = index.snapshots.get(q)
        assert (snapshots is None) == (not retained)
        if snapshots is not None:
            assert snapshots.lanes.tolist() == [lane for lane, _ in retained]
            assert snapshots.pages.tolist() == [int(table[s.request, s.segment]) for _, s in retained]


@pytest.mark.parametrize("gemm", [OneDNNGemm, BatchedGemm, GroupedGemm])
@pytest.mark.parametrize(
    ("mode", "max_cells"), [("diagonal", 100), ("diagonal", 6), ("diagonal", 2), ("auto", 5), ("sequential", 100)]
)
@pytest.mark.parametrize(
    "name", ["armt", "armt with gating", "armt_sw with a sink", "rmt that closes", "prmt that closes"]
)
def test_a_wave_gives_the_sequential_result_by_any_gemm(
    name: str, gemm: type[Gemm], mode: str, max_cells: int, monkeypatch: pytest.MonkeyPatch
):
    """Documents of 4, 2 and 1 segments, so that lanes end at different positions; as in profiling, without pages."""
    monkeypatch.setattr(lanes, "COLLECTED_ROWS", 2 * m)
    torch.manual_seed(0)
    with multiplied_by(gemm):
        model, lengths = random_model(CONFIGS[name]), [4 * S, 2 * S, S]
    starts, segmentation = list(accumulate(lengths, initial=0)), model.config.segmentation(1)
    step = [Chunk(request, starts[request], 0, length, segmentation) for request, length in enumerate(lengths)]
    layout, flow = model.config.segment_layout, model.parts.recurrence.flow
    wave = wave_of(step, Schedule(mode, max_cells * layout.rows, LAYERS, S, layout.rows, flow))
    index = WaveMetadata.build(wave, LAYERS, gemm is GroupedGemm, None, CPU)
    texts = [random_document(model, length, segmentation) for length in lengths]
    inputs = torch.cat([document for document, _, _ in texts])
    outputs = torch.full_like(inputs, torch.nan)
    run_wave(model.parts, index, inputs, outputs)
    assert_near(outputs, torch.cat([expected for _, expected, _ in texts]))
