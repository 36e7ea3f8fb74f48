"""How the rows of open pieces lie behind one another, and which pages they have."""

from __future__ import annotations

import torch

from vllm_armt.core import Cell
from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.plan import OpenPiece

CPU = torch.device("cpu")
PIECES = [
    OpenPiece(request=2, segment=1, offset=3, n=1, row=0, closes=True),
    OpenPiece(request=0, segment=3, offset=0, n=2, row=1, closes=False),
    OpenPiece(request=1, segment=2, offset=2, n=1, row=3, closes=False),
    OpenPiece(request=1, segment=0, offset=0, n=3, row=4, closes=True),
]
TABLE = torch.arange(15, dtype=torch.int32).view(3, 5)
PLAIN = LocalRows(PIECES, Cell(prefix=0, tokens=4, suffix=2), TABLE, CPU)
BETWEEN = LocalRows(PIECES, Cell(prefix=1, tokens=4, suffix=2), TABLE, CPU)
"""With a row before the tokens, too."""


def test_memory_tokens_come_behind_the_tokens_of_a_segment_that_closes():
    assert PLAIN.widths == [1 + 2, 2, 1, 3 + 2]
    assert PLAIN.starts == [0, 3, 5, 6]
    assert len(PLAIN) == 11
    assert PLAIN.suffix_rows(range(4)) == [1, 2, 9, 10]
    assert PLAIN.prefix_rows(range(4)) == []


def test_a_prefix_comes_before_the_tokens_of_a_segment_that_begins():
    assert BETWEEN.widths == [1 + 2, 1 + 2, 1, 1 + 3 + 2]
    assert BETWEEN.prefix_rows(range(4)) == [3, 7]
    assert BETWEEN.suffix_rows(range(4)) == [1, 2, 11, 12]


def test_columns_go_on_from_the_rows_before():
    assert [PLAIN.past(i) for i in range(4)] == [3, 0, 2, 0]
    assert PLAIN.columns == [3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4]
    assert [BETWEEN.past(i) for i in range(4)] == [4, 0, 3, 0]
    assert BETWEEN.columns == [4, 5, 6, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_positions_are_those_of_the_cell():
    assert BETWEEN.positions == BETWEEN.columns
    wrapped = Cell(prefix=1, tokens=4, suffix=2, suffix_position=100)
    assert LocalRows(PIECES, wrapped, TABLE, CPU).positions == [4, 100, 101, 0, 1, 2, 3, 0, 1, 2, 3, 100, 101]
    grown = Cell(prefix=0, tokens=4, suffix=2, stride=6)
    assert LocalRows(PIECES, grown, TABLE, CPU).positions == [9, 10, 11, 18, 19, 14, 0, 1, 2, 3, 4]


def test_pieces_that_open_and_close_a_segment_are_known():
    assert PLAIN.opening == [1, 3]
    assert PLAIN.closing == [0, 3]


def test_pages_are_those_of_the_segments_or_of_columns_ahead():
    assert PLAIN.pages([0, 1, 2]).tolist() == [TABLE[2, 1], TABLE[0, 3], TABLE[1, 2]]
    assert PLAIN.pages([2, 0], ahead=-1).tolist() == [TABLE[1, 1], TABLE[2, 0]]
    assert PLAIN.pages([2, 2], ahead=[0, 1]).tolist() == [TABLE[1, 2], TABLE[1, 3]]
