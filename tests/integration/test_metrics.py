"""What is counted, as by whoever walks through a text segment by segment, and how it comes to a server."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_armt.core import Segmentation
from vllm_armt.integration.metrics import COUNTERS, Counts, put, take
from vllm_armt.plan.step import Chunk, Flow, Schedule, plan_step

L = 3


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, Segmentation, list[tuple[int, int]]]:
    """S, where a text's segments lie, and legal chunks of it: each ends where a segment does, or with the text."""
    S = draw(st.sampled_from([1, 2, 4]))
    alignment, stays_open = draw(st.sampled_from([("left", False), ("left", True), ("right", True), ("center", True)]))
    prompt = draw(st.integers(1, 6 * S + 1))
    segmentation = Segmentation.of_prompt(S, alignment, stays_open, prompt)
    boundaries = {segmentation.begin(i) for i in range(1, prompt + 1)} & set(range(1, prompt))
    is_short = segmentation.size != S or segmentation.lead > 0
    cuts = boundaries if is_short else draw(st.sets(st.sampled_from(sorted(boundaries) or [prompt])))
    ends = sorted(cuts | {prompt})
    decoded = range(prompt + 1, prompt + draw(st.integers(1, 3 * S + 1)))
    return S, segmentation, list(pairwise([0, *ends, *decoded]))


@given(chunks())
def test_counts_are_those_of_the_plan(case: tuple[int, Segmentation, list[tuple[int, int]]]) -> None:
    S, segmentation, pieces = case
    counts = Counts(S, L)
    closed = cells = 0
    for start, end in pieces:
        counts.compute(start, end, segmentation, is_decoded=False)
        plan = plan_step([Chunk(0, 0, start, end, segmentation)], Schedule("diagonal", 64, L, S, S, Flow.SAME_LAYER))
        wave = plan.wave.segments() if plan.wave else []
        cells += sum(group.cells for group in plan.wave.groups(L)) if plan.wave else 0
        closed += len(wave) + sum(tail.closes for tail in plan.tails)
    assert counts.take() == {name: n for name, n in (("segments_read", closed), ("cells", cells)) if n}
    assert counts.take() == {}


def test_counts_survive_the_way_to_another_process_and_leave_nothing_behind() -> None:
    stats, counts = SchedulerStats(), dict.fromkeys(COUNTERS, 7)
    put(stats, counts)
    sent = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(stats))
    assert take(sent) == counts
    assert sent == SchedulerStats()
