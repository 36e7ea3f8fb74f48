"""Which rows of open segments read and write which associative memory."""

from __future__ import annotations

import pytest
import torch

from vllm_armt.core import SegmentLayout
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows
from vllm_armt.recurrence.armt_reads import Reads, build_closings, build_reads

CPU = torch.device("cpu")
PLAIN, WITH_SINK = SegmentLayout(prefix=0, tokens=4, suffix=2), SegmentLayout(prefix=1, tokens=4, suffix=2)
TABLE = torch.arange(1, 17, dtype=torch.int32).view(4, 4)
MIXED = (
    Tail(request=1, segment=0, offset=3, n=1, row=5, closes=True),
    Tail(request=0, segment=2, offset=1, n=1, row=0, closes=False),
    Tail(request=2, segment=1, offset=2, n=2, row=2, closes=True),
    Tail(request=3, segment=3, offset=0, n=1, row=9, closes=False),
)


def rows_of(*pieces: Tail, layout: SegmentLayout = PLAIN) -> TailRows:
    return TailRows(pieces, layout, TABLE, CPU)


def test_pieces_read_the_memory_before_their_segment_by_width_and_first_segments_none():
    single, wide = build_reads(rows_of(*MIXED))
    assert (single.width, wide.width) == (1, 2 + 2)
    assert single.rows is not None
    assert single.rows.tolist() == [[3], [8]]
    assert single.pages.tolist() == [TABLE[0, 1], TABLE[3, 2]]
    assert wide.rows is not None
    assert wide.rows.tolist() == [[4, 5, 6, 7]]
    assert wide.pages.tolist() == [TABLE[2, 0]]


def test_a_sink_reads_with_the_tokens_that_it_leads():
    by_width = build_reads(rows_of(*MIXED, layout=WITH_SINK))
    rows = [reads.rows.tolist() for reads in by_width if reads.rows is not None]
    assert rows == [[[3]], [[8, 9]], [[4, 5, 6, 7]]]


def test_where_all_pieces_read_in_one_width_rows_need_not_be_gathered():
    (reads,) = build_reads(rows_of(MIXED[1], MIXED[3]))
    assert (reads.width, reads.rows) == (1, None)
    (with_memory_tokens,) = build_reads(rows_of(MIXED[2]))
    assert (with_memory_tokens.width, with_memory_tokens.rows) == (2 + 2, None)
    assert build_reads(rows_of(MIXED[0])) == []


def test_rows_are_gathered_as_soon_as_one_piece_reads_nothing():
    (reads,) = build_reads(rows_of(MIXED[0], MIXED[1]))
    assert reads.rows is not None
    assert reads.rows.tolist() == [[1 + 2]]


def test_closings_read_the_memory_before_and_write_to_their_own_page():
    (closings,) = build_closings(rows_of(*MIXED))
    assert closings.rows.tolist() == [[1, 2], [6, 7]]
    assert closings.pages.tolist() == [TABLE[1, 0], TABLE[2, 1]]
    assert closings.first is not None
    assert closings.first.tolist() == [True, False]
    assert closings.read_pages.tolist()[1] == TABLE[2, 0]
    assert build_closings(rows_of(MIXED[1])) == []


def test_copies_are_made_of_so_many_memories_at_a_time(monkeypatch: pytest.MonkeyPatch):
    pieces = [Tail(i, segment, offset=2, n=2, row=2 * i, closes=True) for i, segment in enumerate((1, 0, 3, 2))]
    rows = rows_of(*pieces)
    (reads,), (closings,) = build_reads(rows), build_closings(rows)
    monkeypatch.setattr("vllm_armt.recurrence.armt_reads.COPIES", 2)
    some_reads, some_closings = build_reads(rows), build_closings(rows)
    assert [len(some.pages) for some in some_reads] == [2, 1]
    assert [len(some.pages) for some in some_closings] == [2, 2]
    for whole, parts in ((reads, some_reads), (closings, some_closings)):
        assert torch.equal(torch.cat([part.pages for part in parts]), whole.pages)
        assert whole.rows is not None
        assert torch.equal(torch.cat([part.rows for part in parts if part.rows is not None]), whole.rows)
    assert torch.equal(torch.cat([part.read_pages for part in some_closings]), closings.read_pages)
    assert [part.first is None for part in some_closings] == [False, True]
    # single rows copy nothing
    single = [Tail(i, segment=1, offset=1, n=1, row=i, closes=False) for i in range(4)]
    assert [len(reads.pages) for reads in build_reads(rows_of(*single))] == [4]


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
