"""Windows: which keys of the segment before a segment sees, in a wave and in open rows, and where they come from."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.support.softmax import poisoned_layer
from vllm_armt.attention import AttentionShape, choose_attention
from vllm_armt.attention.naive import attend, causal
from vllm_armt.attention.window import Past, WindowLanes, first_seen, move_closed
from vllm_armt.core import Segmentation, SegmentLayout, Window
from vllm_armt.core.pages import PageLayout
from vllm_armt.plan.step import Chunk, Schedule, Tail, plan_step
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata

CPU = torch.device("cpu")
SEGMENT = SegmentLayout(prefix=1, tokens=4, suffix=2)
S, T, LAYERS = SEGMENT.tokens, SEGMENT.rows, 3
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LAYOUT = PageLayout(S, T, KV_HEADS, HEAD_DIM, torch.float32, {}, keys_stay=True)
WINDOWS = get_args(Window)
SEEN = {
    "all": torch.ones(T, S, dtype=torch.bool),
    "tokens": torch.tensor(
        [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    ).bool(),
    "rows": torch.tensor(
        [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    ).bool(),
}
"""By row of a whole segment, which tokens of the one before it sees."""
WITHOUT_PREFIX = SEEN | {"tokens": SEEN["tokens"][1:], "rows": torch.ones(T - 1, S).triu().bool()}
"""The same where no row stands before the tokens."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shape_of(layout: SegmentLayout, window: Window) -> AttentionShape:
    return AttentionShape(torch.float32, HEADS, KV_HEADS, HEAD_DIM, layout, LAYOUT.columns, window)


def qkv(rows: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, heads, HEAD_DIM), *torch.randn(2, rows, KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_see_the_tokens_before_from_the_first_that_they_see_on(window: Window):
    first = torch.tensor(first_seen(window, SEGMENT))
    assert torch.equal(torch.arange(S) >= first.unsqueeze(1), SEEN[window])


@pytest.mark.parametrize("full_suffix", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_cell_sees_its_window_and_itself(window: Window, full_suffix: bool):
    """The second cell is a document's first segment, which sees nothing before itself."""
    backend = choose_attention("sdpa", CPU, shape_of(dataclasses.replace(SEGMENT, full_suffix=full_suffix), window))
    (q, k, v), (past_k, past_v) = qkv(2 * T), torch.randn(2, 2, S, KV_HEADS, HEAD_DIM)
    mask = torch.stack([SEEN[window], torch.zeros(T, S, dtype=torch.bool)])
    o = backend.attend_cells(q, k, v, T, Past(past_k, past_v, mask))
    for i in range(2):
        own, seen = slice(i * T, (i + 1) * T), torch.cat([mask[i], causal(T, full=2 * full_suffix)], dim=1)
        expected = attend(q[own], torch.cat([past_k[i], k[own]]), torch.cat([past_v[i], v[own]]), seen)
        torch.testing.assert_close(o[own].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "auto", "diagonal"])
@pytest.mark.parametrize("max_cells", [2, 6, 100])
@pytest.mark.parametrize("window", WINDOWS)
def test_cells_of_a_wave_are_given_the_keys_of_the_segments_before_and_leave_theirs(
    window: Window, max_cells: int, mode: str
):
    """Keys are numbered: request, segment, layer and row as digits, their values the negative of that."""
    left = Segmentation(S)
    step = [Chunk(0, 0, 0, 3 * S, left), Chunk(1, 3 * S, 2 * S, 7 * S, left), Chunk(2, 8 * S, 0, S, left)]
    wave = plan_step(step, Schedule(mode, max_cells * T, LAYERS, S, T)).wave
    assert wave is not None
    table = torch.arange(1, 22, dtype=torch.int32).view(3, 7)
    pages = [poisoned_layer(22, LAYOUT) for _ in range(LAYERS)]

    def numbers(request: int, segment: int, layer: int) -> Tensor:
        """Of the rows of a cell, `[T, kv_heads, head_dim]`."""
        number = 1000.0 * request + 100 * segment + 10 * layer
        return (number + torch.arange(T)).view(T, 1, 1).expand(T, KV_HEADS, HEAD_DIM)

    tokens = slice(SEGMENT.prefix, SEGMENT.prefix + S)
    for layer in range(LAYERS):
        before = numbers(1, 1, layer)[tokens].transpose(0, 1)
        pages[layer].k[table[1, 1], :, tokens], pages[layer].v[table[1, 1], :, tokens] = before, -before
    lanes = WindowLanes(window, SEGMENT, WaveMetadata.build(wave, LAYERS, False, table, CPU), pages)
    for group in wave.groups(LAYERS):
        cells = [
            (wave.lanes[i][group.last_position - j], group.first_layer + j)
            for j, count in enumerate(group.lanes)
            for i in range(count)
        ]
        own = torch.cat([numbers(s.request, s.segment, layer) for s, layer in cells])
        past = lanes.past(group, own, -own)
        for cell, (s, layer) in enumerate(cells):
            assert torch.equal(past.mask[cell], SEEN[window] & (s.segment > 0))
            if s.segment > 0:
                expected = numbers(s.request, s.segment - 1, layer)[tokens]
                assert torch.equal(past.k[cell], expected)
                assert torch.equal(past.v[cell], -expected)
        assert past.k.isfinite().all()
    for request, retained in ((0, [1, 2]), (1, [5, 6]), (2, [0])):
        for segment in range(7):
            for layer in range(LAYERS):
                stored = pages[layer].k[table[request, segment], :, tokens].transpose(0, 1)
                if segment in retained:
                    assert torch.equal(stored, numbers(request, segment, layer)[tokens])
                    assert torch.equal(-stored, pages[layer].v[table[request, segment], :, tokens].transpose(0, 1))
                elif (request, segment) != (1, 1):
                    assert stored.isnan().all()


@pytest.mark.parametrize("full_suffix", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_open_rows_see_their_window_their_past_and_themselves(window: Window, prefix: int, full_suffix: bool):
    """A document from its first token on in pages of NaN, beside one that is a segment ahead."""
    layout = dataclasses.replace(SEGMENT, prefix=prefix, full_suffix=full_suffix)
    backend = choose_attention("sdpa", CPU, shape_of(layout, window))
    pages = poisoned_layer(9, LAYOUT)
    table = torch.arange(1, 9, dtype=torch.int32).view(2, 4)
    segmentation, done = Segmentation(S), [0, 0]
    keys: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for tokens in ([4, 0], [2, 1], [1, 3], [1, 1], [1, 2], [3, 1], [2, 4]):
        pieces: list[Tail] = []
        for request, n in enumerate(tokens):
            for piece in segmentation.split(done[request], done[request] + n):
                pieces.append(Tail(request, piece.segment, piece.offset, piece.n, 0, piece.closes))
            done[request] += n
        rows = TailRows(pieces, layout, table, CPU)
        q, k, v = qkv(len(rows))
        o = backend.attend_tails(backend.build_metadata(rows), pages, q, k, v)
        assert len(pieces) == sum(n > 0 for n in tokens)
        for i, own_piece in enumerate(pieces):
            own = slice(rows.starts[i], rows.starts[i] + rows.widths[i])
            mine = keys.setdefault((own_piece.request, own_piece.segment), [])
            mine += zip(k[own], v[own], strict=True)
            before = keys.get((own_piece.request, own_piece.segment - 1), [])[prefix : prefix + S]
            seen = (SEEN if prefix else WITHOUT_PREFIX)[window][len(mine) - rows.widths[i] : len(mine), : len(before)]
            full = layout.suffix if full_suffix and own_piece.closes else 0
            seen = torch.cat([seen, causal(rows.widths[i], len(mine) - rows.widths[i], full)], dim=1)
            every_k, every_v = (torch.stack(x) for x in zip(*before, *mine, strict=True))
            expected = attend(q[own], every_k, every_v, seen)
            torch.testing.assert_close(o[own].double(), expected, rtol=1e-5, atol=1e-5)


def test_keys_that_lie_further_back_are_moved_once_when_their_segment_closes():
    wave = plan_step([Chunk(0, 0, 0, 2 * S, Segmentation(S))], Schedule("sequential", T, 1, S, T)).wave
    assert wave is not None
    pages = [poisoned_layer(4, LAYOUT)]
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    lanes = WindowLanes("rows", SEGMENT, WaveMetadata.build(wave, 1, False, table, CPU), pages, lambda k: k + 100)
    for segment, group in enumerate(wave.groups(1)):
        past = lanes.past(group, torch.full((T, KV_HEADS, HEAD_DIM), float(segment)), torch.ones(T, KV_HEADS, HEAD_DIM))
        assert segment == 0 or torch.equal(past.k, torch.full_like(past.k, 100))
    tokens = slice(SEGMENT.prefix, SEGMENT.prefix + S)
    assert pages[0].k[2, :, tokens].unique().tolist() == [101]
    # a tail that closes the next one
    pages[0].k[3] = 2
    move_closed(lambda k: k + 100, SEGMENT, pages[0], torch.tensor([3]))
    assert pages[0].k[3, :, tokens].unique().tolist() == [102]
    assert pages[0].k[3, :, : SEGMENT.prefix].unique().tolist() == [2]
    assert pages[0].v[2, :, tokens].unique().tolist() == [1]
