"""Every backend of attention against softmax written out: whole cells, and rows of open segments over pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.diagonal.softmax import attend, attend_each, causal, poisoned_layer
from vllm_armt.cache.pages import LayerPages, PageLayout
from vllm_armt.diagonal.attention import Attention, choose_attention
from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.plan import OpenPiece

CPU = torch.device("cpu")
S, m = 37, 3
"""Cells longer than the 32 columns that vLLM's kernel takes at a time."""
BACKENDS = ["sdpa", "vllm_cpu"]
HEADS = [
    pytest.param(4, 4, id="a key head each"),
    pytest.param(4, 2, id="shared key heads"),
    pytest.param(3, 1, id="one key head"),
]
DTYPES = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.bfloat16, 2e-2, id="bfloat16")]


@pytest.fixture(autouse=True)
def seed_and_poisoned_buffers() -> Iterator[None]:
    """Tensors that are made without a value are NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def qkv(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values as projections give them: parts of one tensor."""
    joined = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    split = joined.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    return tuple(x.unflatten(-1, (-1, head_dim)) for x in split)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_cell_sees_itself_causally_and_no_other(
    name: str, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float
):
    """Groups of several sizes one after another: what an earlier one left must not show."""
    T = S + m
    backend = choose_attention(name, CPU, dtype, head_dim, T)
    for cells in (2, 1, 3):
        q, k, v = qkv(cells * T, heads, kv_heads, head_dim, dtype)
        o = backend.cells(q, k, v, T)
        assert o.dtype == dtype
        torch.testing.assert_close(o.double(), attend_each(q, k, v, [T] * cells), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_cell_may_be_as_short_as_a_row(name: str):
    backend = choose_attention(name, CPU, torch.float32, 32, 1)
    q, k, v = qkv(3, 4, 2, 32, torch.float32)
    torch.testing.assert_close(backend.cells(q, k, v, 1), v.repeat_interleave(2, dim=1).flatten(1))


class Segments:
    """Open segments that grow from step to step, each with a page that was full of NaN."""

    def __init__(self, backend: Attention, sizes: tuple[int, int, int], dtype: torch.dtype, count: int) -> None:
        heads, self.kv_heads, self.head_dim = sizes
        self.heads, self.dtype, self.backend = heads, dtype, backend
        layout = PageLayout(S, m, self.kv_heads, self.head_dim, dtype, 12, 16, torch.float32)
        self.pages: LayerPages = poisoned_layer(count + 1, layout)
        self.table = torch.arange(count, 0, -1, dtype=torch.int32).unsqueeze(1)
        self.keys: list[list[Tensor]] = [[] for _ in range(count)]
        self.values: list[list[Tensor]] = [[] for _ in range(count)]

    def step(self, tokens: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Add tokens to segments; return what the backend makes of their rows, and what it should."""
        pieces, row = [], 0
        for i, n in tokens.items():
            offset = sum(len(k) for k in self.keys[i])
            pieces.append(OpenPiece(i, 0, offset, n, row, closes=offset + n == S))
            row += n
        rows = LocalRows(pieces, m, self.table, CPU)
        q, k, v = qkv(len(rows), self.heads, self.kv_heads, self.head_dim, self.dtype)
        expected = []
        for piece, start, width in zip(pieces, rows.starts, rows.widths, strict=True):
            own = slice(start, start + width)
            self.keys[piece.request].append(k[own])
            self.values[piece.request].append(v[own])
            keys, values = (torch.cat(x[piece.request]) for x in (self.keys, self.values))
            expected.append(attend(q[own], keys, values, causal(width, piece.offset)))
        return self.backend.open_rows(self.backend.index(rows), self.pages, q, k, v), torch.cat(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("name", BACKENDS)
def test_open_rows_see_their_segments_past_and_themselves_causally(
    name: str, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float
):
    """Segments of many lengths at once: some begin, some go on, some close with their memory tokens."""
    backend = choose_attention(name, CPU, dtype, head_dim, S + m)
    segments = Segments(backend, (heads, kv_heads, head_dim), dtype, 5)
    steps = [
        {0: 5, 1: 1, 2: 36},
        {0: 1, 3: 33, 1: 2},
        {2: 1, 0: 30, 1: 1, 3: 2},
        {4: S, 3: 1, 0: 1},
        {3: 1, 1: 1},
    ]
    for tokens in steps:
        o, expected = segments.step(tokens)
        assert o.dtype == dtype
        torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_page_that_held_something_else_is_opened_clean(name: str):
    """A page of NaN, as after a memory, is read up to the segment's own keys alone."""
    backend = choose_attention(name, CPU, torch.float32, 32, S + m)
    segments = Segments(backend, (4, 2, 32), torch.float32, 2)
    segments.step({0: 1})
    for x in (segments.pages.k, segments.pages.v):
        x[int(segments.table[1, 0])] = torch.nan
    for tokens in ({1: 2}, {0: 1, 1: 1}):
        o, expected = segments.step(tokens)
        torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_pages_of_the_pieces_are_written(name: str):
    backend = choose_attention(name, CPU, torch.float32, 32, S + m)
    segments = Segments(backend, (4, 2, 32), torch.float32, 3)
    segments.step({0: 3, 2: 1})
    untouched = [0, int(segments.table[1, 0])]
    assert segments.pages.k[untouched].isnan().all()
    assert segments.pages.v[untouched].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_first_tokens_of_documents_can_do_without_pages(name: str):
    """As while vLLM measures how much memory a step takes."""
    backend = choose_attention(name, CPU, torch.float32, 32, S + m)
    pieces = [OpenPiece(0, 0, 0, 4, 0, closes=False), OpenPiece(1, 0, 0, S, 4, closes=True)]
    rows = LocalRows(pieces, m, None, CPU)
    q, k, v = qkv(len(rows), 4, 2, 32, torch.float32)
    o = backend.open_rows(backend.index(rows), None, q, k, v)
    torch.testing.assert_close(o.double(), attend_each(q, k, v, rows.widths), rtol=1e-5, atol=1e-5)
