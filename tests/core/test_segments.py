"""Segment arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.core import Piece, kept_segments, split_chunk

sizes = st.integers(1, 20)


@given(st.integers(0, 100), st.integers(0, 100), sizes)
def test_pieces_cover_the_chunk_in_order_and_nothing_else(start: int, n: int, S: int):
    tokens = [
        piece.segment * S + piece.offset + i for piece in split_chunk(start, start + n, S) for i in range(piece.n)
    ]
    assert tokens == list(range(start, start + n))


@given(st.integers(0, 100), st.integers(1, 100), sizes)
def test_a_piece_lies_in_one_segment_and_only_the_ends_are_not_whole(start: int, n: int, S: int):
    pieces = split_chunk(start, start + n, S)
    assert all(piece.n > 0 and piece.offset + piece.n <= S for piece in pieces)
    assert all(piece.is_whole(S) for piece in pieces[1:-1])
    assert all(piece.closes(S) for piece in pieces[:-1])
    assert pieces[-1].closes(S) == ((start + n) % S == 0)


def test_an_empty_chunk_has_no_pieces():
    assert split_chunk(7, 7, 4) == []


def test_a_piece_may_close_its_segment_without_being_whole():
    (piece,) = split_chunk(6, 8, 4)
    assert piece == Piece(segment=1, offset=2, n=2)
    assert piece.closes(4)
    assert not piece.is_whole(4)


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        pytest.param(1, (-1, 0), id="the KV of the first segment"),
        pytest.param(4, (-1, 0), id="the first memory"),
        pytest.param(5, (0, 1), id="the memory that the open segment reads, and its KV"),
        pytest.param(8, (0, 1), id="the last two memories"),
        pytest.param(12, (1, 2), id="the last two of three"),
    ],
)
def test_what_is_kept_after_four_token_segments(end: int, kept: tuple[int, int]):
    assert kept_segments(end, 4) == kept


@given(st.integers(1, 1000), sizes)
def test_the_next_token_finds_the_memory_that_it_reads(end: int, S: int):
    kept = kept_segments(end, S)
    reads = end // S - 1
    assert reads == -1 or reads in kept
    assert (end - 1) // S == kept[1]
