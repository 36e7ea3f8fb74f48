"""How the rows of open pieces lie behind one another, and which pages they have."""

from __future__ import annotations

import torch

from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.plan import OpenPiece

m = 2
PIECES = [
    OpenPiece(request=2, segment=1, offset=3, n=1, row=0, closes=True),
    OpenPiece(request=0, segment=3, offset=0, n=2, row=1, closes=False),
    OpenPiece(request=1, segment=2, offset=2, n=1, row=3, closes=False),
]
TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)
ROWS = LocalRows(PIECES, m, TABLE, torch.device("cpu"))


def test_a_piece_that_closes_its_segment_is_followed_by_its_memory_tokens():
    assert ROWS.widths == [1 + m, 2, 1]
    assert ROWS.starts == [0, 3, 5]
    assert len(ROWS) == 6


def test_columns_go_on_from_the_offset_and_memory_tokens_come_behind_the_last_token():
    assert ROWS.columns == [3, 4, 5, 0, 1, 2]


def test_the_pieces_that_open_a_segment_begin_at_its_first_token():
    assert ROWS.opening == [1]


def test_pages_are_those_of_the_segments_or_of_those_before():
    assert ROWS.pages([0, 1, 2]).tolist() == [TABLE[2, 1], TABLE[0, 3], TABLE[1, 2]]
    assert ROWS.pages([2, 0], back=1).tolist() == [TABLE[1, 1], TABLE[2, 0]]
