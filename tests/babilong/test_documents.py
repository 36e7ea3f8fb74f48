"""Documents: exact lengths, pieces where they are said to be, and the background around them untouched."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.texts import sentences
from vllm_armt.babilong import Background, Cut, weave


def without(document, pieces) -> np.ndarray:
    """The document's tokens that belong to no piece."""
    mask = np.ones(len(document.ids), dtype=bool)
    for piece, start in zip(pieces, document.starts, strict=True):
        mask[start : start + len(piece)] = False
    return document.ids[mask]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_stand_at_sentence_ends_near_their_depths_in_text_that_is_not_changed(background, data) -> None:
    random = Random(data.draw(st.integers(0, 10**6)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    pieces = [[10_000 + i] * size for i, size in enumerate(sizes)]
    depths = sorted(data.draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes))))
    length = sum(sizes) + data.draw(st.one_of(st.integers(0, 60), st.integers(1000, 4 * len(background.ids))))
    cut = None
    if data.draw(st.booleans()):
        cut = Cut(data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.sampled_from([16, 64])))
    document = weave(pieces, depths, length, background, random, [cut] if cut else [])

    assert len(document.ids) == length
    assert document.starts == sorted(document.starts)
    for piece, start in zip(pieces, document.starts, strict=True):
        assert document.ids[start : start + len(piece)].tolist() == piece
    text = without(document, pieces)
    assert text.size == length - sum(sizes)
    gaps = [start - sum(sizes[:i]) for i, start in enumerate(document.starts)]
    if text.size > 50:
        first = start_of(background, text)
        ends = set(background.ends.tolist())
        at_end = [(first + gap) % len(background.ids) in {end % len(background.ids) for end in ends} for gap in gaps]
        assert all(ok or gap in (0, text.size) for ok, gap in zip(at_end, gaps, strict=True))
        widest = max(np.diff(background.ends, prepend=0).max(), background.ends[0] + 1)
        if cut is None:
            assert all(abs(gap - depth * text.size) <= widest for gap, depth in zip(gaps, depths, strict=True))
    if cut and text.size >= 2 * cut.segment_size and sizes[cut.piece] > 1:
        start, S = document.starts[cut.piece], cut.segment_size
        assert start // S < (start + sizes[cut.piece] - 1) // S
        wished = sum(sizes[: cut.piece]) + depths[cut.piece] * text.size
        assert abs(start - wished) <= 2 * S


@pytest.mark.parametrize("seed", range(20))
def test_boundaries_run_through_as_many_pieces_as_asked_for(background, seed) -> None:
    S, depths = 64, [0.16, 0.3, 0.31, 0.6, 0.85]
    pieces = [[10_000 + i] * 6 for i in range(5)]
    strewn = [(0.75, [20_000] * 9)]
    cuts = [Cut(3, S), Cut(1, S), Cut(2, S), Cut(5, S, at=7)]
    document = weave(pieces, depths, 640, background, Random(seed), cuts, strewn)

    def before_boundary(token: int) -> int:
        at = np.flatnonzero(document.ids == token)
        return int((at // S == at[0] // S).sum())

    assert document.starts == sorted(document.starts)
    assert [before_boundary(10_000 + i) < 6 for i in (0, 1, 3, 4)] == [False, True, True, False]
    # the boundary nearest to the third piece is the second one's already
    assert before_boundary(10_002) == 6
    assert before_boundary(20_000) == 7
    # a sentence ends where the first cut needs it
    quiet = document.ids < 10_000
    first = start_of(background, document.ids[quiet])
    gap = int(quiet[: document.starts[3]].sum())
    assert (first + gap) % len(background.ids) in {end % len(background.ids) for end in background.ends.tolist()}


def test_a_piece_that_opens_a_document_is_cut_though_another_one_opens_it_too(background) -> None:
    document = weave([[1] * 2, [2] * 3], [0.0, 0.0], 1000, background, Random(0), [Cut(0, 16)])
    assert document.starts == [15, 17]


def start_of(background: Background, text: np.ndarray) -> int:
    """Where in the background an excerpt begins, and that it is one."""
    size = len(background.ids)
    window = text[: min(len(text), 50)]
    ring = np.concatenate([background.ids, background.ids[: len(window)]])
    views = np.lib.stride_tricks.sliding_window_view(ring, len(window))[:size]
    for first in np.flatnonzero((views == window).all(axis=1)):
        if np.array_equal(text, background.ids[(first + np.arange(len(text))) % size]):
            return int(first)
    raise AssertionError("the text between the pieces is no excerpt of the background")


def test_pieces_that_do_not_fit_are_refused(background) -> None:
    with pytest.raises(ValueError, match="7 tokens were asked for, but facts and question alone take 8"):
        weave([[1] * 5, [2] * 3], [0.5, 1.0], 7, background, Random(0))


def test_a_document_may_be_many_times_as_long_as_its_background(background) -> None:
    document = weave([[1] * 6] * 20, np.linspace(0, 1, 20).tolist(), 10_000_000, background, Random(0))
    assert len(document.ids) == 10_000_000
    assert (np.diff(document.starts) > 100_000).all()


TEXTS = ['One fi. "Two lo!" (Three\n ba?)  Four... five. six', "Seven ke do. Eight"]


def parts(text: Background, tokenizer) -> list[str]:
    begins = [0, *text.ends.tolist()]
    return [tokenizer.decode(text.ids[a:b]) for a, b in zip(begins, [*text.ends.tolist(), len(text.ids)], strict=True)]


def test_sentences_end_where_a_reader_says_they_do(tokenizer) -> None:
    found = parts(Background.of_texts(TEXTS, tokenizer, "collapsed"), tokenizer)
    assert "".join(found) == ' One fi. "Two lo!" (Three ba?) Four... five. six Seven ke do. Eight'
    assert found[:5] == [" One fi.", ' "Two lo!"', " (Three ba?)", " Four...", " five."]
    found = parts(Background.of_texts(TEXTS, tokenizer), tokenizer)
    assert "".join(found) == "".join(f"{text}\n" for text in TEXTS)
    assert found[:5] == ["One fi.", ' "Two lo!"', " (Three\n ba?)", "  Four...", " five."]


def test_a_sentence_ends_behind_its_space_where_spaces_trail(trailing) -> None:
    found = parts(Background.of_texts(TEXTS, trailing), trailing)
    assert "".join(found) == "".join(f"{text}\n" for text in TEXTS)
    assert found[:4] == ["One fi. ", '"Two lo!" ', "(Three\n ba?) ", " Four... "]


def test_a_paragraph_ends_without_a_full_stop_too(tokenizer) -> None:
    found = parts(
        Background.of_texts(["A heading\n \n* an item\n* another\n\n    code()\nA line."], tokenizer), tokenizer
    )
    assert found == ["A heading", "\n \n* an item\n* another", "\n\n    code()\nA line.", "\n"]


def test_mentions_are_the_sentences_with_a_name(tokenizer) -> None:
    text = Background.of_texts(["We saw Mary go. We saw Marys go. a b c. In the office? No."], tokenizer)
    assert [tokenizer.decode(text.ids[a:b]) for a, b in text.mentions] == ["We saw Mary go.", " In the office?"]


def test_a_text_begins_anew_after_its_end(background) -> None:
    size = len(background.ids)
    ring = background.excerpt(size - 5, 2 * size)
    assert np.array_equal(ring, background.ids[(size - 5 + np.arange(2 * size)) % size])
    assert np.array_equal(background.excerpt(-3, 3), background.ids[-3:])
    for token in (0, 7, size // 2, size - 1):
        near = background.nearest_end(token)
        assert background.nearest_end(token + 3 * size) == near + 3 * size
        rounds = [background.ends + shift for shift in (-size, 0, size)]
        assert abs(near - token) == min(np.abs(ends - token).min() for ends in rounds)


def test_text_without_sentences_is_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(ValueError, match="holds no sentence"):
        Background.of_texts(["no end"], tokenizer)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no .txt files")):
        Background.of_directory(tmp_path, tokenizer)
    (tmp_path / "b.txt").write_text("Second one.")
    (tmp_path / "a.txt").write_text(sentences(Random(1), 3))
    made = Background.of_directory(tmp_path, tokenizer)
    assert tokenizer.decode(made.ids).endswith("\nSecond one.\n")
