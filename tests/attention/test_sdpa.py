"""The parts of the `sdpa` backend: its masks, and attention over a past under one."""

from __future__ import annotations

import pytest
import torch

from vllm_armt.attention import AttentionShape, sdpa
from vllm_armt.attention.naive import attend
from vllm_armt.attention.sdpa import SDPAttention, TailBatches, attend_past
from vllm_armt.core import SegmentLayout, Window
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows

CPU = torch.device("cpu")
SEGMENT = SegmentLayout(prefix=1, tokens=3, suffix=1)
TABLE = torch.arange(8, dtype=torch.int32).view(2, 4)


@pytest.fixture(autouse=True)
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many columns are looked at as are needed, but for the next power of two."""
    monkeypatch.setattr(sdpa, "LEAST_COLUMNS", 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_rows_attend_what_a_mask_shows(heads: int, kv_heads: int):
    torch.manual_seed(0)
    q = torch.randn(2, 3, heads, 8)
    k, v = (torch.randn(2, 7, kv_heads, 8) for _ in range(2))
    mask = torch.rand(2, 3, 7) > 0.5
    mask[:, :, 6] = True
    for i, o in enumerate(attend_past(q, k, v, mask)):
        torch.testing.assert_close(o.double(), attend(q[i], k[i], v[i], mask[i]), rtol=1e-5, atol=1e-5)


def index(window: Window | None, *pieces: tuple[int, int, int, bool]) -> TailBatches:
    """Pieces of documents 0 and 1, each as segment, offset, n and whether it closes."""
    made = [Tail(i, *piece[:3], row=0, closes=piece[3]) for i, piece in enumerate(pieces)]
    backend = SDPAttention(CPU, AttentionShape(torch.float32, 1, 1, 8, SEGMENT, 32, window))
    return backend.build_metadata(TailRows(made, SEGMENT, TABLE, CPU))


def masks(batches: TailBatches) -> list[list[list[list[int]]]]:
    return [batch.mask.int().tolist() for batch in batches.batches if batch.mask is not None]


def test_the_mask_hides_columns_beyond_a_segments_past_and_rows_to_come():
    # pasts of three and two rows, for which four columns are looked at, and two and three rows of their own
    three, two = [1, 1, 1, 0], [1, 1, 0, 0]
    found = masks(index(None, (0, 2, 1, True), (0, 1, 2, True)))
    assert found == [[[[*past, 1, 0, 0], [*past, 1, 1, 0], [*past, 1, 1, 1]] for past in (three, two)]]


def test_a_segment_that_stays_open_is_seen_in_its_pages_alone():
    (batch,) = index(None, (0, 1, 2, False), (0, 2, 2, False)).batches
    assert (batch.own, batch.paged_width) == (False, 8)
    rows = [[1] * seen + [0] * (8 - seen) for seen in (3, 4, 4, 5)]
    assert batch.mask is not None
    assert batch.mask.int().tolist() == [rows[:2], rows[2:]]


def test_steps_of_about_the_same_past_look_at_equally_many_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sdpa, "LEAST_COLUMNS", 8)
    backend = SDPAttention(CPU, AttentionShape(torch.float32, 1, 1, 8, SEGMENT, 40, None))
    widths = [
        backend.build_metadata(TailRows([Tail(0, 0, past, 1, 0, False)], SEGMENT, TABLE, CPU)) for past in range(79)
    ]
    found = [batch.paged_width for index in widths for batch in index.batches]
    # a prefix of one row and its own more; never more than the pages have
    assert found == [0, *[8] * 6, *[16] * 8, *[32] * 16, *[40] * 8, *[64] * 24, *[80] * 16]


def test_where_all_keys_are_a_pieces_own_there_is_no_mask():
    (batch,) = index(None, (0, 0, 2, False), (2, 0, 2, False)).batches
    assert (batch.mask, batch.pages, batch.window) == (None, None, None)


def test_a_sliding_window_hides_the_tokens_before_from_the_prefix_and_older_ones_from_a_token():
    prefix, first, second = [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]
    assert masks(index("tokens", (1, 0, 2, False))) == [[[prefix, first, second]]]


def test_the_suffix_sees_the_whole_window():
    third, suffix = [0, 0, 1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0, 1, 1]
    assert masks(index("tokens", (1, 2, 1, True))) == [[[third, suffix]]]


def test_all_rows_see_all_tokens_before_of_a_segment_that_is_longer_than_a_cell_too():
    # the window's three tokens, the prefix and eight earlier tokens, the piece's own two, of 16 columns
    assert masks(index("all", (1, 8, 2, False))) == [[[[1] * 13 + [0] * 6, [1] * 14 + [0] * 5]]]


def test_first_segments_have_no_window():
    batches = index("all", (0, 1, 1, False), (1, 1, 1, False)).batches
    assert sorted(batch.window is None for batch in batches) == [False, True]
    assert [batch.window.tolist() for batch in batches if batch.window is not None] == [[int(TABLE[1, 0])]]
    assert (batches[0].mask is None, batches[1].mask is None) == (False, False)


def test_keys_are_stored_of_segments_that_stay_open_and_of_all_tokens_where_a_window_needs_them():
    pieces = ((0, 0, 2, False), (1, 2, 1, True))
    plain, window = index(None, *pieces).stores, index("tokens", *pieces).stores
    assert plain is not None
    assert (plain.rows.tolist(), plain.columns.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert plain.pages.tolist() == [int(TABLE[0, 0])] * 3
    assert window is not None
    # but never of the suffix, which is behind the last row
    assert (window.rows.tolist(), window.columns.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert window.pages.tolist() == [int(TABLE[0, 0])] * 3 + [int(TABLE[1, 1])]
    assert index(None, pieces[1]).stores is None
