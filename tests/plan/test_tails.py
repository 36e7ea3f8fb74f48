"""How the rows of open pieces lie behind one another, and which pages they have."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.core import SegmentLayout
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows, padded, ranges

CPU = torch.device("cpu")
PIECES = [
    Tail(request=2, segment=1, offset=3, n=1, row=0, closes=True),
    Tail(request=0, segment=3, offset=0, n=2, row=1, closes=False),
    Tail(request=1, segment=2, offset=2, n=1, row=3, closes=False),
    Tail(request=1, segment=0, offset=0, n=3, row=4, closes=True),
]
TABLE = torch.arange(15, dtype=torch.int32).view(3, 5)
PLAIN = TailRows(PIECES, SegmentLayout(prefix=0, tokens=4, suffix=2), TABLE, CPU)
BETWEEN = TailRows(PIECES, SegmentLayout(prefix=1, tokens=4, suffix=2), TABLE, CPU)
"""With a row before the tokens, too."""

cells = st.builds(
    SegmentLayout,
    prefix=st.integers(0, 3),
    tokens=st.just(4),
    suffix=st.integers(1, 3),
    suffix_position=st.none() | st.integers(20, 30),
    stride=st.integers(0, 20),
)


def test_ranges_lie_one_behind_another():
    assert ranges(np.array([5, 0, 9, 2]), np.array([2, 3, 0, 1])).tolist() == [5, 6, 0, 1, 2, 2]


def test_padding_repeats_what_comes_last():
    assert padded(np.array([3, 1, 2])).tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 1]]


def test_memory_tokens_come_behind_the_tokens_of_a_segment_that_closes():
    assert PLAIN.widths.tolist() == [1 + 2, 2, 1, 3 + 2]
    assert PLAIN.starts.tolist() == [0, 3, 5, 6]
    assert len(PLAIN) == 11
    assert PLAIN.token_rows.tolist() == [0, 3, 4, 5, 6, 7, 8]
    assert PLAIN.suffix_rows.tolist() == [1, 2, 9, 10]
    assert PLAIN.prefix_rows.tolist() == []


def test_a_prefix_comes_before_the_tokens_of_a_segment_that_begins():
    assert BETWEEN.widths.tolist() == [1 + 2, 1 + 2, 1, 1 + 3 + 2]
    assert BETWEEN.prefix_rows.tolist() == [3, 7]
    assert BETWEEN.token_rows.tolist() == [0, 4, 5, 6, 8, 9, 10]
    assert BETWEEN.suffix_rows.tolist() == [1, 2, 11, 12]


def test_pieces_know_how_many_rows_their_segments_have_before():
    assert PLAIN.pasts.tolist() == [3, 0, 2, 0]
    assert BETWEEN.pasts.tolist() == [4, 0, 3, 0]


@given(cells)
def test_positions_are_those_of_the_segment_layout(layout: SegmentLayout):
    expected = [layout.positions(piece.segment, piece.offset, piece.n, piece.closes) for piece in PIECES]
    assert TailRows(PIECES, layout, TABLE, CPU).positions.tolist() == list(chain.from_iterable(expected))


def test_pieces_that_open_and_close_a_segment_are_known():
    assert PLAIN.opens.tolist() == [False, True, False, True]
    assert PLAIN.closes.tolist() == [True, False, False, True]


def test_pages_are_those_of_the_segments_or_of_columns_ahead():
    assert PLAIN.pages(np.array([0, 1, 2])).tolist() == [TABLE[2, 1], TABLE[0, 3], TABLE[1, 2]]
    assert PLAIN.pages(np.array([2, 0]), ahead=-1).tolist() == [TABLE[1, 1], TABLE[2, 0]]
    assert PLAIN.pages(np.array([2, 2]), ahead=np.array([0, 1])).tolist() == [TABLE[1, 2], TABLE[1, 3]]


def test_keys_go_on_in_the_pages_behind_those_of_the_rows_before():
    """Pages of two columns: piece 3 fills three of them, piece 0 ends its second and begins its third."""
    places = BETWEEN.places(np.array([3, 0]), np.array([6, 2]), columns=2)
    assert places.table.tolist() == [TABLE[1, :3].tolist(), TABLE[2, 1:4].tolist()]
    assert places.rows.tolist() == [7, 8, 9, 10, 11, 12, 0, 1]
    (a, b, c), d = TABLE[1, :3].tolist(), TABLE[2, 3].item()
    assert places.pages.tolist() == [a, a, b, b, c, c, d, d]
    assert places.columns.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert places.cleared is not None
    assert places.cleared.tolist() == [a, b, c, d]


def test_no_page_is_cleared_that_already_holds_keys():
    places = PLAIN.places(np.array([2, 0]), np.array([1, 1]), columns=32)
    assert (places.pages.tolist(), places.columns.tolist()) == ([TABLE[1, 2], TABLE[2, 1]], [2, 3])
    assert places.cleared is None


def test_without_pages_pieces_have_some_of_their_own():
    rows = TailRows(PIECES[3:] * 2, PLAIN.layout, None, CPU)
    places = rows.places(np.array([0, 1]), rows.widths, columns=4)
    assert places.table.tolist() == [[0, 1], [2, 3]]
    assert places.pages.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]
