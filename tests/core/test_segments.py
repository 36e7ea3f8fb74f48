"""Segment arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.core import Piece, Segmentation

sizes = st.integers(1, 20)
lengths = st.integers(1, 200)
alignments = st.sampled_from(["left", "right", "center"])
segmentations = st.builds(Segmentation.of_prompt, sizes, alignments, st.booleans(), lengths)


def authors_segments(S: int, alignment: str, T: int) -> list[int]:
    """Tokens of each segment, as the authors' code cuts a prompt."""
    if alignment == "left":
        borders = [*range(0, T, S), T]
    elif alignment == "right":
        borders = [*range(T, 0, -S), 0][::-1]
    else:
        return [len(chunk) for chunk in torch.arange(T).chunk(-(-T // S))]
    return [end - begin for begin, end in itertools.pairwise(borders)]


@given(sizes, alignments, lengths)
def test_the_segments_of_a_prompt_are_the_authors(S: int, alignment: str, T: int):
    pieces = Segmentation.of_prompt(S, alignment, True, T).split(0, T)
    assert [piece.n for piece in pieces] == authors_segments(S, alignment, T)
    assert [piece.segment for piece in pieces] == list(range(len(pieces)))
    assert all(piece.is_whole for piece in pieces[:-1])
    assert not pieces[-1].closes


@given(segmentations, st.integers(0, 200), st.integers(0, 100))
def test_pieces_cover_the_chunk_in_order_and_nothing_else(segmentation: Segmentation, start: int, n: int):
    tokens = [
        segmentation.begin(piece.segment) + piece.offset + i
        for piece in segmentation.split(start, start + n)
        for i in range(piece.n)
    ]
    assert tokens == list(range(start, start + n))


@given(segmentations, st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_any_cut_into_chunks_puts_each_token_where_it_is_alone(segmentation: Segmentation, chunks: list[int]):
    ends = list(itertools.accumulate(chunks))
    for start, end in zip([0, *ends], ends, strict=False):
        for piece in segmentation.split(start, end):
            first = segmentation.begin(piece.segment) + piece.offset
            alone = [segmentation.split(token, token + 1)[0] for token in range(first, first + piece.n)]
            assert [one.segment for one in alone] == [piece.segment] * piece.n
            assert [one.closes for one in alone] == [False] * (piece.n - 1) + [piece.closes]


@given(segmentations, st.integers(0, 200), lengths)
def test_only_the_ends_of_a_chunk_are_not_whole(segmentation: Segmentation, start: int, n: int):
    pieces = segmentation.split(start, start + n)
    assert all(piece.n > 0 for piece in pieces)
    assert all(piece.is_whole for piece in pieces[1:-1])
    assert all(piece.closes for piece in pieces[:-1])
    assert pieces[-1].closes == (segmentation.end(start + n - 1) == start + n)


@given(segmentations, st.integers(0, 300))
def test_a_token_lies_between_the_borders_of_its_segment(segmentation: Segmentation, token: int):
    segment, end = segmentation.segment(token), segmentation.end(token)
    assert segmentation.begin(segment) <= token
    assert (end is None) == (segment == segmentation.last)
    if end is not None:
        assert token < end == segmentation.begin(segment + 1)
        assert end - segmentation.begin(segment) <= segmentation.size


@given(sizes, alignments, lengths, lengths)
def test_what_stays_open_holds_every_token_after_the_prompt(S: int, alignment: str, T: int, more: int):
    segmentation = Segmentation.of_prompt(S, alignment, True, T)
    (piece,) = segmentation.split(T, T + more)
    assert piece.segment == segmentation.last == segmentation.segment(T - 1)
    assert not piece.closes


def test_an_empty_chunk_has_no_pieces():
    assert Segmentation(4).split(7, 7) == []


def test_a_piece_may_close_its_segment_without_being_whole():
    (piece,) = Segmentation(4).split(6, 8)
    assert piece == Piece(segment=1, offset=2, n=2, closes=True)
    assert not piece.is_whole


def test_a_short_first_segment_is_whole():
    assert Segmentation(4, lead=3).split(0, 3) == [Piece(0, 0, 1, True), Piece(1, 0, 2, False)]
    assert Segmentation(4, lead=3).split(0, 3)[0].is_whole


@given(segmentations, st.integers(0, 300))
def test_closed_tokens_are_those_before_the_open_segment(segmentation: Segmentation, tokens: int):
    closed = segmentation.closed_tokens(tokens)
    assert closed == sum(piece.n for piece in segmentation.split(0, tokens) if piece.closes)


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        pytest.param(1, [-1, 0], id="the KV of the first segment"),
        pytest.param(4, [-1, 0], id="the first memory"),
        pytest.param(5, [0, 1], id="the memory that the open segment reads, and its KV"),
        pytest.param(8, [0, 1], id="the last two memories"),
        pytest.param(12, [1, 2], id="the last two of three"),
    ],
)
def test_what_is_kept_after_four_token_segments(end: int, kept: list[int]):
    assert list(Segmentation(4).retained(end, 4)) == kept


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        pytest.param(5, [0, 1], id="its first page"),
        pytest.param(9, [0, 1], id="its first page, full"),
        pytest.param(10, [0, 1, 2], id="a second page"),
        pytest.param(15, [0, 1, 2, 3], id="a third one"),
    ],
)
def test_a_segment_that_stays_open_takes_a_column_for_every_page(end: int, kept: list[int]):
    assert list(Segmentation(4, last=1).retained(end, 5)) == kept


@given(segmentations, lengths)
def test_the_next_token_finds_the_memory_that_it_reads(segmentation: Segmentation, end: int):
    retained = segmentation.retained(end, segmentation.size)
    reads = segmentation.segment(end) - 1
    assert reads == -1 or reads in retained
    assert segmentation.segment(end - 1) in retained


@given(segmentations, st.integers(1, 200), sizes)
def test_there_is_room_until_a_further_column_is_kept(segmentation: Segmentation, end: int, page_tokens: int):
    room, columns = segmentation.room(end, page_tokens), segmentation.retained(end, page_tokens).stop
    assert room >= end
    assert segmentation.retained(room, page_tokens).stop == columns
    assert segmentation.retained(room + 1, page_tokens).stop > columns
