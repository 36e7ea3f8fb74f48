"""The integers of a step's open pieces: which rows read, close and come out."""

from __future__ import annotations

import pytest
import torch

from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.open_index import OpenIndex, Reads
from vllm_armt.diagonal.plan import OpenPiece

CPU = torch.device("cpu")
S, m = 4, 2
TABLE = torch.arange(1, 17, dtype=torch.int32).view(4, 4)


def build(*pieces: OpenPiece) -> OpenIndex:
    attention = choose_attention("sdpa", CPU, torch.float32, 32, S + m)
    return OpenIndex.build(pieces, m, attention, TABLE, CPU)


MIXED = (
    OpenPiece(request=1, segment=0, offset=3, n=1, row=5, closes=True),
    OpenPiece(request=0, segment=2, offset=1, n=1, row=0, closes=False),
    OpenPiece(request=2, segment=1, offset=2, n=2, row=2, closes=True),
    OpenPiece(request=3, segment=3, offset=0, n=1, row=9, closes=False),
)


def test_rows_take_tokens_from_the_input_and_memory_tokens_before_it():
    index = build(*MIXED)
    assert index.tokens.tolist() == [m + 5, 0, 1, m + 0, m + 2, m + 3, 0, 1, m + 9]
    assert index.positions.tolist() == [3, 4, 5, 1, 2, 3, 4, 5, 0]


def test_only_the_rows_of_tokens_come_out_and_to_where_they_came_from():
    index = build(*MIXED)
    assert index.out_local.tolist() == [0, 3, 4, 5, 8]
    assert index.out_rows.tolist() == [5, 0, 2, 3, 9]


def test_pieces_read_the_memory_before_their_segment_by_width_and_first_segments_none():
    single, wide = build(*MIXED).reads
    assert (single.width, wide.width) == (1, 2 + m)
    assert single.rows is not None
    assert single.rows.tolist() == [[3], [8]]
    assert single.pages.tolist() == [TABLE[0, 1], TABLE[3, 2]]
    assert wide.rows is not None
    assert wide.rows.tolist() == [[4, 5, 6, 7]]
    assert wide.pages.tolist() == [TABLE[2, 0]]


def test_where_all_pieces_read_in_one_width_rows_need_not_be_gathered():
    (reads,) = build(MIXED[1], MIXED[3]).reads
    assert (reads.width, reads.rows) == (1, None)
    (with_memory_tokens,) = build(MIXED[2]).reads
    assert (with_memory_tokens.width, with_memory_tokens.rows) == (2 + m, None)
    assert build(MIXED[0]).reads == []


def test_rows_are_gathered_as_soon_as_one_piece_reads_nothing():
    (reads,) = build(MIXED[0], MIXED[1]).reads
    assert reads.rows is not None
    assert reads.rows.tolist() == [[1 + m]]


def test_closings_read_the_memory_before_and_write_to_their_own_page():
    closings = build(*MIXED).closings
    assert closings is not None
    assert closings.rows.tolist() == [[1, 2], [6, 7]]
    assert closings.pages.tolist() == [TABLE[1, 0], TABLE[2, 1]]
    assert closings.first.tolist() == [True, False]
    assert closings.read_pages.tolist()[1] == TABLE[2, 0]
    assert build(MIXED[1]).closings is None


@pytest.mark.parametrize("rows", [torch.arange(6).view(3, 2), torch.tensor([[4, 1], [0, 5]])])
def test_reads_gather_rows_and_add_to_them(rows: torch.Tensor):
    x, A = torch.randn(6, 3), torch.randn(*rows.shape, 3)
    reads = Reads(2, rows, torch.zeros(len(rows)))
    assert torch.equal(reads.gather(x), x[rows])
    expected = x.clone()
    for piece, places in enumerate(rows.tolist()):
        for j, row in enumerate(places):
            expected[row] += A[piece, j]
    if rows.flatten().tolist() == list(range(6)):
        every = x.clone()
        in_order = Reads(2, None, torch.zeros(3))
        assert torch.equal(in_order.gather(every), x[rows])
        in_order.add(every, A)
        assert torch.equal(every, expected)
    reads.add(x, A)
    assert torch.equal(x, expected)
