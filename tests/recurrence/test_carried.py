"""Memory in the token stream of open segments: which rows it takes, and in which pages it is found and left."""

from __future__ import annotations

import torch

from tests.support.softmax import poisoned_layer
from vllm_armt.core import SegmentLayout
from vllm_armt.core.pages import PageLayout, StateTensor
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows
from vllm_armt.recurrence.carried import build_carried

CPU = torch.device("cpu")
m, d = 2, 6
SEGMENT = SegmentLayout(prefix=m, tokens=4, suffix=m)
TABLE = torch.arange(1, 17, dtype=torch.int32).view(4, 4)
PIECES = [
    Tail(request=1, segment=0, offset=3, n=1, row=5, closes=True),
    Tail(request=0, segment=2, offset=0, n=1, row=0, closes=False),
    Tail(request=2, segment=1, offset=2, n=2, row=2, closes=True),
    Tail(request=3, segment=0, offset=0, n=4, row=9, closes=True),
]


def test_memory_stands_before_segments_that_begin_and_behind_those_that_end():
    carried = build_carried(TailRows(PIECES, SEGMENT, TABLE, CPU))
    assert carried.prefix.tolist() == [3, 4, 10, 11]
    assert carried.suffix.tolist() == [1, 2, 8, 9, 16, 17]


def test_it_comes_from_the_page_before_and_goes_to_the_segments_own():
    carried = build_carried(TailRows(PIECES, SEGMENT, TABLE, CPU))
    assert carried.opening is not None
    assert carried.opening.first.tolist() == [False, True]
    assert carried.opening.read_pages is not None
    assert carried.opening.read_pages[0] == TABLE[0, 1]
    assert carried.closing is not None
    assert carried.closing.first.tolist() == [True, False, True]
    assert carried.closing.pages is not None
    assert carried.closing.pages.tolist() == [TABLE[1, 0], TABLE[2, 1], TABLE[3, 0]]
    assert carried.closing.read_pages is not None
    assert carried.closing.read_pages[1] == TABLE[2, 0]


def test_segments_that_neither_begin_nor_end_take_no_memory():
    carried = build_carried(TailRows([Tail(0, 2, 1, 2, 0, closes=False)], SEGMENT, TABLE, CPU))
    assert (carried.opening, carried.closing) == (None, None)
    assert (len(carried.prefix), len(carried.suffix)) == (0, 0)


def test_first_segments_get_the_learned_memory_whatever_lies_in_pages():
    """All pages but the one that is read are NaN."""
    initial, stored = torch.randn(m, d), torch.randn(m, d)
    pages = poisoned_layer(
        17, PageLayout(4, SEGMENT.rows, 1, 8, torch.float32, {"memory": StateTensor((m, d), torch.float32)})
    )
    pages.state["memory"][int(TABLE[2, 0])] = stored
    closing = build_carried(TailRows(PIECES, SEGMENT, TABLE, CPU)).closing
    assert closing is not None
    assert torch.equal(closing.read(initial, [pages], 0), torch.stack([initial, stored, initial]))


def test_without_pages_all_segments_are_first():
    carried = build_carried(TailRows([PIECES[3]], SEGMENT, None, CPU))
    initial = torch.randn(m, d)
    for segments in (carried.opening, carried.closing):
        assert segments is not None
        assert torch.equal(segments.read(initial, None, 0), initial.unsqueeze(0))
