"""The rows of a segment and their positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.core import SegmentLayout

cells = st.builds(
    SegmentLayout,
    prefix=st.integers(0, 4),
    tokens=st.integers(1, 8),
    suffix=st.integers(1, 4),
    suffix_position=st.none() | st.integers(20, 30),
    stride=st.integers(0, 20),
)


@pytest.mark.parametrize(
    ("layout", "segment", "n", "positions"),
    [
        pytest.param(
            SegmentLayout(0, 4, 2), 3, 4, [0, 1, 2, 3, 4, 5], id="ARMT: memory behind the tokens, anew in each segment"
        ),
        pytest.param(SegmentLayout(0, 4, 2), 3, 3, [0, 1, 2, 3, 4], id="a short segment: memory comes earlier"),
        pytest.param(SegmentLayout(1, 4, 2), 3, 4, [0, 1, 2, 3, 4, 5, 6], id="a sink comes first"),
        pytest.param(SegmentLayout(2, 4, 2), 3, 4, [0, 1, 2, 3, 4, 5, 6, 7], id="RMT: memory on both sides"),
        pytest.param(SegmentLayout(0, 4, 2, 10), 3, 3, [0, 1, 2, 10, 11], id="memory has positions of its own"),
        pytest.param(SegmentLayout(2, 4, 2, 12), 3, 3, [0, 1, 2, 3, 4, 12, 13], id="RMT with them"),
        pytest.param(
            SegmentLayout(0, 4, 2, stride=6), 3, 4, [18, 19, 20, 21, 22, 23], id="positions grow over the text"
        ),
        pytest.param(SegmentLayout(1, 4, 2, stride=7), 3, 2, [21, 22, 23, 24, 25], id="with a sink in each segment"),
    ],
)
def test_positions_of_a_whole_segment(layout: SegmentLayout, segment: int, n: int, positions: list[int]):
    assert layout.positions(segment, 0, n, True) == positions


@given(cells, st.integers(0, 5), st.data())
def test_any_cut_of_a_segment_has_the_same_positions(layout: SegmentLayout, segment: int, data: st.DataObject):
    n = data.draw(st.integers(1, layout.tokens))
    cut = data.draw(st.integers(1, n))
    first = layout.positions(segment, 0, cut, False)
    rest = layout.positions(segment, cut, n - cut, True)
    assert first + rest == layout.positions(segment, 0, n, True)


@given(cells)
def test_a_whole_segment_has_all_its_rows(layout: SegmentLayout):
    assert len(layout.positions(0, 0, layout.tokens, True)) == layout.rows


@given(cells, st.integers(0, 5), st.integers(0, 20))
def test_tokens_that_do_not_close_bring_no_memory(layout: SegmentLayout, segment: int, offset: int):
    positions = layout.positions(segment, offset, 3, False)
    first = segment * layout.stride + layout.prefix + offset
    assert positions[-3:] == [first, first + 1, first + 2]
    assert len(positions) == 3 + (layout.prefix if offset == 0 else 0)
