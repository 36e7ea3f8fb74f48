"""Properties that every step plan has, whatever the scheduler hands it."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from tests.support.chunks import chunks, schedules
from vllm_armt.core import Segmentation
from vllm_armt.plan.step import Chunk, ClosedSegment, Flow, Group, Schedule, StepPlan, Wave, plan_step

S = 4
LEFT = Segmentation(S)
SegmentLayout = tuple[int, int, int]
"""Request, segment, layer."""


def lane(request: int, *segments: int) -> list[ClosedSegment]:
    """A document's segments in a lane."""
    return [ClosedSegment(request, s, row=0, enters=s == segments[0], retained=False) for s in segments]


def cells(wave: Wave, group: Group) -> list[SegmentLayout]:
    """The cells of a group in the order of its rows: layer by layer, lane by lane."""
    return [
        (wave.lanes[i][group.last_position - j].request, wave.lanes[i][group.last_position - j].segment, layer)
        for j, (layer, lanes) in enumerate(enumerate(group.lanes, group.first_layer))
        for i in range(lanes)
    ]


def wave_of(step: list[Chunk], schedule: Schedule) -> Wave:
    """The wave of a step that has one."""
    wave = plan_step(step, schedule).wave
    if wave is None:
        reject()
    return wave


def closed(plan: StepPlan) -> list[ClosedSegment]:
    return [] if plan.wave is None else plan.wave.segments()


@given(chunks(S), schedules(S))
def test_every_token_is_computed_once_in_its_own_row(step: list[Chunk], schedule: Schedule):
    plan = plan_step(step, schedule)
    begin = {c.request: c.segmentation.begin for c in step}
    computed = [(s.request, begin[s.request](s.segment) + i, s.row + i) for s in closed(plan) for i in range(S)]
    computed += [
        (p.request, begin[p.request](p.segment) + p.offset + i, p.row + i) for p in plan.tails for i in range(p.n)
    ]
    asked = [(c.request, c.start + i, c.row + i) for c in step for i in range(c.end - c.start)]
    assert sorted(computed) == asked


@given(chunks(S), schedules(S))
def test_the_wave_has_the_segments_of_full_size_that_close_and_a_tail_is_a_chunks_last_piece(
    step: list[Chunk], schedule: Schedule
):
    plan = plan_step(step, schedule)
    pieces = {c.request: c.segmentation.split(c.start, c.end) for c in step}
    whole = [(r, p.segment) for r, split in pieces.items() for p in split if p.offset == 0 and p.closes and p.n == S]
    assert sorted((s.request, s.segment) for s in closed(plan)) == whole
    for tail in plan.tails:
        last = pieces[tail.request][-1]
        assert (tail.segment, tail.offset, tail.n, tail.closes) == (last.segment, last.offset, last.n, last.closes)


@given(chunks(S), schedules(S))
def test_every_cell_runs_once_and_after_the_cells_it_depends_on(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    top = schedule.num_layers - 1
    entering = {(s.request, s.segment) for s in wave.segments() if s.enters}
    done: set[SegmentLayout] = set()
    for group in wave.groups(schedule.num_layers):
        ready = cells(wave, group)
        for request, segment, layer in ready:
            assert (request, segment, layer) not in done
            assert layer == 0 or (request, segment, layer - 1) in done
            if (request, segment) in entering:
                continue
            if schedule.flow is Flow.SAME_LAYER:
                assert (request, segment - 1, layer) in done
            elif schedule.flow is Flow.TOP_LAYER or layer == top:
                assert (request, segment - 1, top) in done
            else:
                # it takes what the cell above had, which may run beside it: layers of a group are served from the top
                assert (request, segment - 1, layer + 1) in done.union(ready)
                assert (request, segment, layer + 1) not in done.union(ready)
        done.update(ready)
    assert done == {(s.request, s.segment, layer) for s in wave.segments() for layer in range(schedule.num_layers)}


@given(chunks(S), schedules(S))
def test_a_group_is_its_span_of_the_buffer(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    buffer = wave.segments()
    for group in wave.groups(schedule.num_layers):
        assert 1 <= len(group.lanes) <= wave.depth
        assert group.last_position - len(group.lanes) + 1 >= 0
        begin, end = wave.span(group)
        assert [(s.request, s.segment) for s in buffer[begin:end]] == [c[:2] for c in cells(wave, group)]


@given(chunks(S), schedules(S))
def test_a_group_stays_inside_its_block_of_layers(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    for group in wave.groups(schedule.num_layers):
        block = group.first_layer // wave.depth
        assert (group.first_layer + len(group.lanes) - 1) // wave.depth == block


@given(chunks(S), schedules(S))
def test_a_group_has_every_lane_that_reaches_its_positions(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    for group in wave.groups(schedule.num_layers):
        positions = range(group.last_position, group.last_position - len(group.lanes), -1)
        assert group.lanes == tuple(sum(len(lane) > q for lane in wave.lanes) for q in positions)


@given(chunks(S), schedules(S))
def test_a_group_has_no_more_cells_than_fill_the_device(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    assert wave.max_cells == schedule.max_cells
    assert all(group.cells <= wave.max_cells for group in wave.groups(schedule.num_layers))


@given(chunks(S), schedules(S))
def test_a_diagonal_is_cut_only_where_the_next_layer_would_exceed_the_most_cells_and_its_highest_layers_come_first(
    step: list[Chunk], schedule: Schedule
):
    wave = wave_of(step, schedule)
    if wave.by_segment:
        return
    for before, group in pairwise(wave.groups(schedule.num_layers)):
        block, diagonal = (group.first_layer // wave.depth, group.first_layer + group.last_position)
        if (before.first_layer // wave.depth, before.first_layer + before.last_position) == (block, diagonal):
            assert group.first_layer + len(group.lanes) == before.first_layer
            assert before.cells + group.lanes[-1] > wave.max_cells


@given(chunks(S), schedules(S))
def test_by_segment_every_position_passes_all_layers_before_the_next_one_enters(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    across_layers = schedule.flow is Flow.DIAGONAL and schedule.mode == "sequential"
    assert wave.by_segment == (schedule.flow is Flow.TOP_LAYER or across_layers)
    if wave.by_segment:
        order = [(group.last_position, group.first_layer) for group in wave.groups(schedule.num_layers)]
        assert order == [(q, layer) for q in range(wave.positions) for layer in range(schedule.num_layers)]


@given(chunks(S), schedules(S))
def test_lanes_hold_whole_documents_in_order_and_the_longest_lane_is_first(step: list[Chunk], schedule: Schedule):
    wave = wave_of(step, schedule)
    assert [len(lane) for lane in wave.lanes] == sorted(map(len, wave.lanes), reverse=True)
    assert all(wave.lanes)
    placed = []
    for queue in wave.lanes:
        for request, document in groupby(queue, key=lambda s: s.request):
            segments = list(document)
            first = segments[0].segment
            assert [s.segment for s in segments] == list(range(first, first + len(segments)))
            assert [s.enters for s in segments] == [True] + [False] * (len(segments) - 1)
            placed.append(request)
    assert len(placed) == len(set(placed))


@given(chunks(S), schedules(S))
def test_state_is_kept_where_pages_are_allocated(step: list[Chunk], schedule: Schedule):
    plan = plan_step(step, schedule)
    retained = {c.request: c.segmentation.retained(c.end, S) for c in step}
    for segment in closed(plan):
        assert segment.retained == (segment.segment in retained[segment.request])
    assert all(piece.segment in retained[piece.request] for piece in plan.tails)


def test_depth_one_is_the_sequential_order():
    wave = Wave([lane(0, 0, 1, 2), lane(1, 0)], depth=1, max_cells=8)
    order = [cell for group in wave.groups(2) for cell in cells(wave, group)]
    assert order == [
        *[(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0)],
        *[(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 2, 1)],
    ]


def test_by_segment_a_lanes_next_segment_waits_for_the_top_layer():
    wave = Wave([lane(0, 0, 1), lane(1, 0)], depth=2, max_cells=8, by_segment=True)
    order = [cell for group in wave.groups(2) for cell in cells(wave, group)]
    assert order == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_full_depth_runs_segments_plus_layers_minus_one_diagonals():
    groups = list(Wave([lane(0, 0, 1, 2, 3)], depth=3, max_cells=8).groups(3))
    assert [(g.first_layer, len(g.lanes), g.last_position) for g in groups] == [
        (0, 1, 0),
        (0, 2, 1),
        (0, 3, 2),
        (0, 3, 3),
        (1, 2, 3),
        (2, 1, 3),
    ]


def test_the_longest_document_goes_first_and_each_to_the_shortest_lane():
    step = [Chunk(0, 0, 0, 2 * S, LEFT), Chunk(1, 2 * S, 0, 3 * S, LEFT), Chunk(2, 5 * S, 0, 2 * S, LEFT)]
    wave = plan_step(step, Schedule("sequential", target_rows=2, num_layers=1, segment_size=S, cell_rows=1)).wave
    assert wave is not None
    assert [[s.request for s in lane] for lane in wave.lanes] == [[0, 0, 2, 2], [1, 1, 1]]


def test_a_diagonal_stays_one_group_where_a_lane_has_ended():
    wave = Wave([lane(0, 0, 1), lane(1, 0)], depth=2, max_cells=8)
    assert list(wave.groups(2)) == [Group(0, 0, (2,)), Group(0, 1, (1, 2)), Group(1, 1, (1,))]


def test_a_diagonal_of_too_many_cells_is_cut_between_layers():
    wave = Wave([lane(0, 0, 1, 2), lane(1, 0, 1)], depth=3, max_cells=3)
    third_diagonal = [group for group in wave.groups(3) if group.first_layer + group.last_position == 2]
    assert third_diagonal == [Group(2, 0, (2,)), Group(0, 2, (1, 2))]


AUTO = Schedule("auto", 64, 2, S, 6)


@pytest.mark.parametrize(("start", "end"), [(1, 5), (3, 8), (5, 12)])
def test_a_chunk_from_inside_a_segment_past_its_end_is_refused(start: int, end: int):
    with pytest.raises(ValueError, match=rf"\[{start}, {end}\).*start with a part of a segment of 4.*past its end"):
        plan_step([Chunk(0, 0, start, end, LEFT)], AUTO)


@pytest.mark.parametrize("segmentation", [Segmentation(S, lead=1), Segmentation(S - 1)])
def test_a_chunk_past_the_end_of_a_segment_that_closes_early_is_refused(segmentation: Segmentation):
    with pytest.raises(ValueError, match=r"\[0, 4\).*past its end"):
        plan_step([Chunk(0, 0, 0, S, segmentation)], AUTO)
    (tail,) = plan_step([Chunk(0, 0, 0, S - 1, segmentation)], AUTO).tails
    assert (tail.n, tail.closes) == (S - 1, True)


def test_a_segment_that_never_closes_is_a_tail_however_long_it_is():
    plan = plan_step([Chunk(0, 0, S, 4 * S, Segmentation(S, last=2)), Chunk(1, 3 * S, 0, S, LEFT)], AUTO)
    (tail,) = plan.tails
    assert (tail.segment, tail.offset, tail.n, tail.closes) == (2, 0, 2 * S, False)
    assert [(s.request, s.segment, s.retained) for s in closed(plan)] == [(0, 1, True), (1, 0, True)]


def test_a_step_of_decodes_has_no_wave():
    plan = plan_step([Chunk(0, 0, 9, 10, LEFT), Chunk(1, 1, 3, 4, LEFT)], AUTO)
    assert plan.wave is None
    assert [piece.closes for piece in plan.tails] == [False, True]


def test_an_empty_chunk_asks_for_nothing():
    assert plan_step([Chunk(0, 0, 8, 8, LEFT)], AUTO) == StepPlan(None, [])


def shape(schedule: Schedule, documents: int) -> tuple[int, int]:
    """Lanes and depth of a wave of so many documents."""
    wave = schedule.wave([lane(request, 0, 1) for request in range(documents)])
    return wave.width, wave.depth


@given(schedules(S), st.integers(1, 50))
def test_a_wave_is_never_wider_than_its_documents_nor_deeper_than_the_model(schedule: Schedule, documents: int):
    lanes, depth = shape(schedule, documents)
    assert 1 <= lanes <= documents
    assert 1 <= depth <= schedule.num_layers
    if schedule.flow is Flow.SAME_LAYER:
        assert depth == {"diagonal": schedule.num_layers, "sequential": 1}.get(schedule.mode, depth)
    else:
        assert depth == schedule.num_layers


@given(schedules(S), st.integers(1, 50))
def test_auto_fills_the_device_and_goes_no_further_than_the_next_layer(schedule: Schedule, documents: int):
    if schedule.mode != "auto" or schedule.flow is not Flow.SAME_LAYER:
        return
    lanes, depth = shape(schedule, documents)
    rows = lanes * depth * schedule.cell_rows
    limits_reached = lanes == documents and depth == schedule.num_layers
    assert limits_reached or rows > schedule.target_rows - schedule.cell_rows
    assert depth == 1 or lanes * (depth - 1) * schedule.cell_rows < schedule.target_rows


@pytest.mark.parametrize(
    ("flow", "mode", "documents", "expected"),
    [
        pytest.param(Flow.SAME_LAYER, "sequential", 3, (3, 1), id="sequential: all documents, one layer"),
        pytest.param(Flow.SAME_LAYER, "sequential", 50, (8, 1), id="sequential: as many documents as fill the device"),
        pytest.param(Flow.SAME_LAYER, "diagonal", 1, (1, 4), id="diagonal: all layers"),
        pytest.param(Flow.SAME_LAYER, "diagonal", 50, (2, 4), id="diagonal: as many lanes as fill the device"),
        pytest.param(Flow.SAME_LAYER, "auto", 1, (1, 4), id="auto: one document needs all layers"),
        pytest.param(Flow.SAME_LAYER, "auto", 4, (4, 2), id="auto: four documents need two"),
        pytest.param(Flow.SAME_LAYER, "auto", 8, (8, 1), id="auto: eight documents fill the device alone"),
        pytest.param(Flow.DIAGONAL, "auto", 8, (2, 4), id="what crosses layers: auto is diagonal"),
        pytest.param(Flow.DIAGONAL, "sequential", 50, (8, 4), id="what crosses layers: sequential is by segment"),
        pytest.param(Flow.TOP_LAYER, "diagonal", 3, (3, 4), id="through the top: all documents, by segment"),
        pytest.param(Flow.TOP_LAYER, "auto", 50, (8, 4), id="through the top: as many as fill the device"),
    ],
)
def test_the_shape_of_a_wave_on_a_device_filled_by_eight_cells(
    flow: Flow, mode: str, documents: int, expected: tuple[int, int]
):
    schedule = Schedule(mode, target_rows=160, num_layers=4, segment_size=S, cell_rows=20, flow=flow)
    assert shape(schedule, documents) == expected
