"""Random steps: what the scheduler may ask of a step plan."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_armt.diagonal.plan import Chunk, Schedule


@st.composite
def chunk_ends(draw: st.DrawFn, S: int, most: int = 5) -> tuple[int, int]:
    """Start and end of a legal chunk: it starts on a boundary, or starts inside a segment and stays in it."""
    first = draw(st.integers(0, 3)) * S
    if draw(st.booleans()):
        return first, first + draw(st.integers(1, most * S))
    offset = draw(st.integers(0, S - 1))
    return first + offset, first + draw(st.integers(offset + 1, S))


@st.composite
def chunks(draw: st.DrawFn, S: int) -> list[Chunk]:
    """A step of up to five requests, their rows one behind another."""
    made: list[Chunk] = []
    row = 0
    for request in range(draw(st.integers(1, 5))):
        start, end = draw(chunk_ends(S))
        made.append(Chunk(request, row, start, end))
        row += end - start
    return made


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return Schedule(
        mode=draw(st.sampled_from(["auto", "diagonal", "sequential"])),
        target_rows=draw(st.integers(1, 200)),
        num_layers=draw(st.integers(1, 6)),
        cell_rows=draw(st.integers(1, 20)),
    )
