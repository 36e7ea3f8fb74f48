"""Every backend of attention against softmax written out: whole cells, and rows of open segments over pages.

`flash_attn` runs on a GPU where there is one, in bfloat16, and elsewhere with its kernels written out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.flash_kernels import stand_in
from tests.support.softmax import attend_each, poisoned_layer
from vllm_armt.attention import Attention, AttentionShape, choose_attention
from vllm_armt.attention.flash_attn import FlashAttention
from vllm_armt.attention.naive import attend, causal
from vllm_armt.core import SegmentLayout
from vllm_armt.core.pages import LayerPages, PageLayout
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows

SEGMENT = SegmentLayout(prefix=0, tokens=37, suffix=3)
"""Longer than the 32 columns that vLLM's kernel takes at a time."""
S, COLUMNS = SEGMENT.tokens, 64
HAS_GPU = torch.cuda.is_available()
BACKENDS = ["sdpa", "vllm_cpu", "flash_attn"]
HEADS = [
    pytest.param(4, 4, id="a key head each"),
    pytest.param(4, 2, id="shared key heads"),
    pytest.param(3, 1, id="one key head"),
]
FLOAT32, BFLOAT16 = (torch.float32, 1e-5), (torch.bfloat16, 2e-2)
"""Types and what they may be off by."""


def exact(name: str) -> tuple[torch.dtype, float]:
    """The widest type that a backend takes."""
    return BFLOAT16 if name == "flash_attn" and HAS_GPU else FLOAT32


RUNS = [
    pytest.param(name, *kind, id=f"{name}, {kind[0]}")
    for name in BACKENDS
    for kind in {exact(name): None, BFLOAT16: None}
]


@pytest.fixture(autouse=True)
def seed_and_poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that are made without a value are NaN."""
    if not HAS_GPU:
        stand_in(monkeypatch)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def device_of(name: str) -> torch.device:
    return torch.device("cuda" if name == "flash_attn" and HAS_GPU else "cpu")


def backend_of(
    name: str,
    dtype: torch.dtype | None = None,
    sizes: tuple[int, int, int] = (4, 2, 32),
    layout: SegmentLayout = SEGMENT,
    reach: int | None = None,
) -> Attention:
    """A backend for a type, by default the widest that it takes, and for heads, kv_heads and head_dim."""
    shape = AttentionShape(dtype or exact(name)[0], *sizes, layout, COLUMNS, reach=reach)
    if name == "flash_attn":
        # also where it would be refused, as its kernels are stood in for
        return FlashAttention(device_of(name), shape)
    return choose_attention(name, device_of(name), shape)


def qkv(
    name: str, rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Queries, keys and values for a backend as projections give them: parts of one tensor."""
    joined = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(device_of(name), dtype or exact(name)[0])
    split = joined.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    return tuple(x.unflatten(-1, (-1, head_dim)) for x in split)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize(("name", "dtype", "tolerance"), RUNS)
def test_a_cell_sees_itself_causally_and_no_other(
    name: str, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float
):
    """Groups of several sizes one after another: what an earlier one left must not show."""
    backend = backend_of(name, dtype, (heads, kv_heads, head_dim))
    for cells in (2, 1, 3):
        q, k, v = qkv(name, cells * SEGMENT.rows, heads, kv_heads, head_dim, dtype)
        o = backend.attend_cells(q, k, v, SEGMENT.rows)
        assert o.dtype == dtype
        expected = attend_each(q, k, v, [SEGMENT.rows] * cells)
        torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reach", [1, 7, 34, SEGMENT.rows])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_of_a_cell_sees_as_far_back_as_its_layer_reaches(name: str, reach: int):
    """Through the kernel's blocks of 32 keys and within one; its own key is among them."""
    backend = backend_of(name, reach=reach)
    for cells in (2, 3):
        q, k, v = qkv(name, cells * SEGMENT.rows, 4, 2, 32)
        o = backend.attend_cells(q, k, v, SEGMENT.rows)
        expected = attend_each(q, k, v, [SEGMENT.rows] * cells, reach)
        tolerance = exact(name)[1]
        torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_cell_may_be_as_short_as_a_row(name: str):
    backend = backend_of(name, layout=SegmentLayout(0, 1, 0))
    q, k, v = qkv(name, 3, 4, 2, 32)
    torch.testing.assert_close(backend.attend_cells(q, k, v, 1), v.repeat_interleave(2, dim=1).flatten(1))


class Segments:
    """Open segments that grow from step to step, each with pages that were full of NaN.

    Segment 0 of document i; with `never_closes` it goes on beyond S tokens.
    """

    def __init__(
        self,
        name: str,
        count: int,
        sizes: tuple[int, int, int] = (4, 2, 32),
        kind: tuple[torch.dtype, float] | None = None,
        layout: SegmentLayout = SEGMENT,
        never_closes: bool = False,
        reach: int | None = None,
    ) -> None:
        self.dtype, self.tolerance = kind or exact(name)
        self.name, self.sizes, self.layout, self.never_closes = name, sizes, layout, never_closes
        _, kv_heads, head_dim = sizes
        self.reach = reach
        self.backend = backend_of(name, self.dtype, sizes, layout, reach)
        self.device = device_of(name)
        page_layout = PageLayout(S, layout.rows, kv_heads, head_dim, self.dtype, {})
        assert page_layout.columns == COLUMNS
        # four pages a document; page 0 belongs to none
        self.pages: LayerPages = poisoned_layer(4 * count + 1, page_layout, self.device)
        self.table = torch.arange(4 * count, 0, -1, dtype=torch.int32, device=self.device).view(count, 4)
        self.tokens = [0] * count
        self.keys: list[list[Tensor]] = [[] for _ in range(count)]
        self.values: list[list[Tensor]] = [[] for _ in range(count)]

    def step(self, tokens: dict[int, int]) -> None:
        """Add tokens to segments, and compare what the backend makes of their rows with what it should."""
        pieces, row = [], 0
        for i, n in tokens.items():
            closes = self.tokens[i] + n == S and not self.never_closes
            pieces.append(Tail(i, 0, self.tokens[i], n, row, closes))
            self.tokens[i] += n
            row += n
        rows = TailRows(pieces, self.layout, self.table, self.device)
        q, k, v = qkv(self.name, len(rows), *self.sizes, self.dtype)
        expected = []
        for piece, start, width in zip(pieces, rows.starts, rows.widths, strict=True):
            own = slice(start, start + width)
            self.keys[piece.request].append(k[own])
            self.values[piece.request].append(v[own])
            keys, values = (torch.cat(x[piece.request]) for x in (self.keys, self.values))
            expected.append(attend(q[own], keys, values, causal(width, len(keys) - width, reach=self.reach)))
        o = self.backend.attend_tails(self.backend.build_metadata(rows), self.pages, q, k, v)
        assert o.dtype == self.dtype
        torch.testing.assert_close(o.double(), torch.cat(expected), rtol=self.tolerance, atol=self.tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize(("name", "dtype", "tolerance"), RUNS)
def test_open_rows_see_their_segments_past_and_themselves_causally(
    name: str, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float
):
    """Segments of many lengths at once: some begin, some go on, some close with their memory tokens."""
    segments = Segments(name, 5, (heads, kv_heads, head_dim), (dtype, tolerance))
    steps = [
        {0: 5, 1: 1, 2: 36},
        {0: 1, 3: 33, 1: 2},
        {2: 1, 0: 30, 1: 1, 3: 2},
        {4: S, 3: 1, 0: 1},
        {3: 1, 1: 1},
    ]
    for tokens in steps:
        segments.step(tokens)


@pytest.mark.parametrize("reach", [1, 7, 34])
@pytest.mark.parametrize("name", BACKENDS)
def test_open_rows_see_as_far_back_as_their_layer_reaches(name: str, reach: int):
    """Decodes, pieces longer than the reach, memory tokens that close a segment, and a segment of several pages."""
    segments = Segments(name, 5, reach=reach)
    for tokens in ({0: 5, 1: 1, 2: 36}, {0: 1, 3: 33, 1: 2}, {2: 1, 0: 30, 1: 1, 3: 2}, {4: S, 3: 1, 0: 1}):
        segments.step(tokens)
    beyond = Segments(name, 2, layout=SegmentLayout(3, S, 3), never_closes=True, reach=reach)
    for tokens in ({0: COLUMNS - 3, 1: 2}, {0: 1, 1: 2 * COLUMNS}, {0: 40, 1: 1}, {0: 1, 1: 1}):
        beyond.step(tokens)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_segment_that_never_closes_goes_on_in_the_pages_behind_its_own(name: str, prefix: int):
    """Pieces that end a page, begin one, or reach over two boundaries, beside segments of one page and of two."""
    layout = SegmentLayout(prefix, S, 3)
    segments = Segments(name, 4, layout=layout, never_closes=True)
    steps = [
        {0: COLUMNS - prefix, 1: 2, 2: COLUMNS - prefix - 1},
        {0: 1, 1: 1, 2: 1},
        {2: 1, 0: 1, 1: 2 * COLUMNS},
        {0: COLUMNS + 5, 3: 3 * COLUMNS, 2: 1},
        {0: 1, 1: 1, 2: 1, 3: 1},
    ]
    for tokens in steps:
        segments.step(tokens)
    untouched = [0, *segments.table[2, 2:].tolist()]
    assert segments.pages.k[untouched].isnan().all()


@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_page_that_held_something_else_is_opened_clean(name: str, page: int):
    """A page of NaN, as after a memory, is read up to the segment's own keys alone."""
    segments = Segments(name, 2, never_closes=True)
    # another segment's keys go further, and both are read side by side
    before = page * COLUMNS
    for tokens in ({0: before + 9}, *([{1: before}] if before else []), {1: 2}, {0: 1, 1: 1}):
        segments.step(tokens)


@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_pages_of_the_pieces_are_written(name: str):
    segments = Segments(name, 3)
    segments.step({0: 3, 2: 1})
    written = segments.table[[0, 2], 0].tolist()
    untouched = [page for page in range(len(segments.pages.k)) if page not in written]
    assert segments.pages.k[untouched].isnan().all()
    assert segments.pages.v[untouched].isnan().all()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name", BACKENDS)
def test_first_tokens_of_documents_can_do_without_pages(name: str, prefix: int):
    """As while vLLM measures how much memory a step takes."""
    layout = SegmentLayout(prefix, S, 3)
    backend = backend_of(name, layout=layout)
    pieces = [Tail(0, 0, 0, 4, 0, closes=False), Tail(1, 0, 0, S, 4, closes=True)]
    rows = TailRows(pieces, layout, None, device_of(name))
    q, k, v = qkv(name, len(rows), 4, 2, 32)
    o = backend.attend_tails(backend.build_metadata(rows), None, q, k, v)
    tolerance = exact(name)[1]
    torch.testing.assert_close(o.double(), attend_each(q, k, v, rows.widths.tolist()), rtol=tolerance, atol=tolerance)
