"""Random steps: what the scheduler may ask of a step plan."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_armt.core import Segmentation
from vllm_armt.plan.step import Chunk, Flow, Schedule

MODES = ("auto", "diagonal", "sequential")


def furthest_end(segmentation: Segmentation, S: int, start: int, text_end: int) -> int:
    """How far a chunk from `start` may reach: over segments of S tokens that it covers, into the one after them."""
    end = start
    for piece in segmentation.split(start, text_end):
        end += piece.n
        if not (piece.is_whole and piece.n == S):
            break
    return end


@st.composite
def segmentations(draw: st.DrawFn, S: int) -> Segmentation:
    """Those of requests with prompts of some segments."""
    stays_open = draw(st.booleans())
    alignment = draw(st.sampled_from(["left", "right", "center"])) if stays_open else "left"
    return Segmentation.of_prompt(S, alignment, stays_open, draw(st.integers(1, 5 * S)))


@st.composite
def chunks(draw: st.DrawFn, S: int, most: int = 5) -> list[Chunk]:
    """A step of up to five requests, their rows one behind another."""
    made: list[Chunk] = []
    row = 0
    for request in range(draw(st.integers(1, 5))):
        segmentation = draw(segmentations(S))
        start = draw(st.integers(0, 4 * S))
        if draw(st.booleans()):
            start = segmentation.begin(segmentation.segment(start))
        end = draw(st.integers(start + 1, furthest_end(segmentation, S, start, start + most * S)))
        made.append(Chunk(request, row, start, end, segmentation))
        row += end - start
    return made


@st.composite
def schedules(draw: st.DrawFn, S: int, num_layers: int | None = None) -> Schedule:
    """Any schedule of a model with segments of S tokens, of so many layers or of up to six."""
    return Schedule(
        mode=draw(st.sampled_from(MODES)),
        target_rows=draw(st.integers(1, 200)),
        num_layers=num_layers or draw(st.integers(1, 6)),
        segment_size=S,
        cell_rows=draw(st.integers(S, 20)),
        flow=draw(st.sampled_from(Flow)),
    )
