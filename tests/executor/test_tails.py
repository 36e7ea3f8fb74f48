"""The integers of a step's open pieces: where their rows come from and where they go."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import pytest
import torch

from vllm_armt.attention import AttentionShape, LayerAttention
from vllm_armt.core import SegmentLayout
from vllm_armt.executor.tails import TailMetadata
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows

CPU = torch.device("cpu")
TABLE = torch.arange(1, 17, dtype=torch.int32).view(4, 4)
PIECES = [
    Tail(request=1, segment=0, offset=3, n=1, row=5, closes=True),
    Tail(request=0, segment=2, offset=1, n=1, row=0, closes=False),
    Tail(request=2, segment=1, offset=0, n=4, row=1, closes=True),
    Tail(request=3, segment=3, offset=0, n=1, row=9, closes=False),
]


class CountingRecurrence:
    """A recurrence that has to know how many rows there are."""

    def build_metadata(self, rows: TailRows, pages: None) -> int:
        return len(rows)


def build(layout: SegmentLayout) -> TailMetadata:
    attention = LayerAttention.choose("sdpa", CPU, AttentionShape(torch.float32, 1, 1, 32, layout, 32), [None])
    rows = TailRows(PIECES, layout, TABLE, CPU)
    return TailMetadata.build(rows, attention, CountingRecurrence(), None)  # type: ignore[arg-type]


def test_rows_take_tokens_from_the_input_and_memory_tokens_before_it():
    index = build(SegmentLayout(prefix=0, tokens=4, suffix=2))
    a, b = 0, 1
    assert index.tokens.tolist() == [2 + 5, a, b, 2 + 0, 2 + 1, 2 + 2, 2 + 3, 2 + 4, a, b, 2 + 9]
    assert index.positions.tolist() == [3, 4, 5, 1, 0, 1, 2, 3, 4, 5, 0]


def test_rows_that_lead_a_segment_come_before_its_first_token():
    index = build(SegmentLayout(prefix=1, tokens=4, suffix=2))
    sink, a, b = 0, 1, 2
    assert index.tokens.tolist() == [3 + 5, a, b, 3 + 0, sink, 3 + 1, 3 + 2, 3 + 3, 3 + 4, a, b, sink, 3 + 9]
    assert index.positions.tolist() == [4, 5, 6, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize(("prefix", "local"), [(0, [0, 3, 4, 5, 6, 7, 10]), (1, [0, 3, 5, 6, 7, 8, 12])])
def test_only_the_rows_of_tokens_come_out_and_to_where_they_came_from(prefix: int, local: list[int]):
    index = build(SegmentLayout(prefix, tokens=4, suffix=2))
    assert index.out_local.tolist() == local
    assert index.out_rows.tolist() == [5, 0, 1, 2, 3, 4, 9]


def lines_run(backend: str, tokens: int) -> int:
    """Lines of Python that run for four pieces of so many tokens; each turn of a loop is one, in whatever it calls."""
    layout = SegmentLayout(prefix=1, tokens=1024, suffix=2)
    attention = LayerAttention.choose(backend, CPU, AttentionShape(torch.float32, 1, 1, 32, layout, 1056), [7, None])
    pieces = [Tail(i, 0, i, tokens, i * tokens, closes=i == 3) for i in range(4)]
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    # what other tests left must not be collected, and counted, here
    gc.collect()
    gc.disable()
    sys.settrace(trace)
    try:
        rows = TailRows(pieces, layout, TABLE, CPU)
        TailMetadata.build(rows, attention, CountingRecurrence(), None)  # type: ignore[arg-type]
    finally:
        sys.settrace(previous)
        gc.enable()
    return lines


@pytest.mark.parametrize("backend", ["sdpa", "vllm_cpu"])
def test_python_works_by_the_piece_not_by_the_token(backend: str):
    lines_run(backend, 8)
    assert lines_run(backend, 8) == lines_run(backend, 512)


def test_the_recurrence_indexes_the_same_rows():
    assert build(SegmentLayout(prefix=1, tokens=4, suffix=2)).recurrence == 13
