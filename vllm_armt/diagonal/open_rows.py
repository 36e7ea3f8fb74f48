"""Rows of open segments: decoded tokens and the ends of prompts, layer by layer over all requests.

Their keys and values go to the segment's page. A row that ends its segment brings the m memory tokens
along, which vLLM never sees; they write the memory, and the page turns from keys into memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.diagonal.attention import attend_cells, attend_past, past_mask
from vllm_armt.diagonal.plan import OpenPiece
from vllm_armt.diagonal.stack import Stack, upload


@dataclass(frozen=True)
class Batch:
    """Pieces of similar length that run as one padded batch where rows must be kept apart.

    Padding repeats a piece's last row; it comes after the valid rows, so nothing valid sees it.

    Attributes:
        gather: `[pieces, width]`, local rows.
        valid: `[rows]`, the places of `gather`, flattened, that are not padding; their local rows are `rows`.
        read_pages: `[pieces]`, pages of the memory that they read; None in first segments.
        past_pages: `[pieces]`, pages with the earlier keys of their segments; None where there are none.
        past_width: columns of the pages that are needed.
        mask: bool `[pieces, width, past_width + width]`, with `past_pages`.
    """

    gather: Tensor
    valid: Tensor
    rows: Tensor
    read_pages: Tensor | None
    past_pages: Tensor | None
    past_width: int
    mask: Tensor | None

    def padded(self, x: Tensor) -> Tensor:
        """`[local rows, *] -> [pieces, width, *]`."""
        return x[self.gather]

    def scatter(self, target: Tensor, padded: Tensor) -> None:
        """Put the valid rows of `[pieces, width, *]` into their places in `[local rows, *]`."""
        target[self.rows] = padded.flatten(0, 1)[self.valid]


@dataclass(frozen=True)
class Closings:
    """Segments that end here: local rows `[pieces, m]` of their memory tokens, and their pages.

    Attributes:
        rows: local rows.
        pages: where the memory goes.
        read_pages: the memory before; read only where `first` is false.
        first: bool `[pieces]`.
    """

    rows: Tensor
    pages: Tensor
    read_pages: Tensor
    first: Tensor


@dataclass(frozen=True)
class OpenIndex:
    """The open pieces of a step with their integers on the device.

    Local rows are the pieces' tokens, each piece followed by its memory tokens if it closes.

    Attributes:
        tokens: `[local rows]`, rows of the memory tokens followed by the step's input.
        out_local, out_rows: local rows of real tokens, and their rows in the step's input.
        positions: `[local rows]`, positions inside the segment.
        batches: cover every local row once.
        store_rows, store_pages, store_columns: `[stored rows]`, local rows whose keys and values go to a
            page; None where there are no pages.
        opened_pages: pages of the segments that begin here.
        closings: None if no segment ends here.
    """

    tokens: Tensor
    out_local: Tensor
    out_rows: Tensor
    positions: Tensor
    batches: list[Batch]
    store_rows: Tensor | None
    store_pages: Tensor
    store_columns: Tensor
    opened_pages: Tensor
    closings: Closings | None

    @classmethod
    def build(
        cls,
        pieces: Sequence[OpenPiece],
        m: int,
        block_table: Tensor | None,
        device: torch.device,
    ) -> OpenIndex:
        """Upload pieces; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        tokens: list[int] = []
        out_local: list[int] = []
        positions: list[int] = []
        starts: list[int] = []
        store: list[tuple[int, int, int, int]] = []
        for piece in pieces:
            local = len(tokens)
            starts.append(local)
            tokens += range(m + piece.row, m + piece.row + piece.n)
            out_local += range(local, local + piece.n)
            positions += range(piece.offset, piece.offset + _width(piece, m))
            if piece.closes:
                tokens += range(m)
            else:
                store += [(local + i, piece.request, piece.segment, piece.offset + i) for i in range(piece.n)]
        lists = [tokens, out_local, positions, *(list(column) for column in zip(*store, strict=True))]
        if not store:
            lists += [[]] * 4
        opened = [piece for piece in pieces if piece.offset == 0]
        lists += [[piece.request for piece in opened], [piece.segment for piece in opened]]
        tokens_, out_local_, positions_, store_rows, requests, segments, columns, *opened_ = upload(lists, device)
        by_kind: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
        for i, piece in enumerate(pieces):
            by_kind[_width(piece, m).bit_length(), piece.segment > 0, piece.offset > 0].append(i)
        batches = [
            _batch([pieces[i] for i in members], [starts[i] for i in members], m, block_table, device)
            for members in by_kind.values()
        ]
        closing = [i for i, piece in enumerate(pieces) if piece.closes]
        return cls(
            tokens_,
            out_local_,
            tokens_[out_local_] - m,
            positions_,
            batches,
            store_rows if block_table is not None and store else None,
            requests if block_table is None else block_table[requests, segments],
            columns,
            opened_[0] if block_table is None else block_table[*opened_],
            _closings([pieces[i] for i in closing], [starts[i] for i in closing], m, block_table, device)
            if closing and block_table is not None
            else None,
        )


def _width(piece: OpenPiece, m: int) -> int:
    """Rows of a piece, memory tokens included."""
    return piece.n + (m if piece.closes else 0)


def _batch(
    pieces: list[OpenPiece], starts: list[int], m: int, block_table: Tensor | None, device: torch.device
) -> Batch:
    widths = [_width(piece, m) for piece in pieces]
    width = max(widths)
    gather = [start + min(i, w - 1) for start, w in zip(starts, widths, strict=True) for i in range(width)]
    valid = [p * width + i for p, w in enumerate(widths) for i in range(w)]
    past = [piece.offset for piece in pieces]
    gather_, valid_, past_, requests, segments = upload(
        [gather, valid, past, [piece.request for piece in pieces], [piece.segment for piece in pieces]], device
    )
    reads, has_past = pieces[0].segment > 0, past[0] > 0
    past_width = max(past)

    def pages(columns: Tensor) -> Tensor:
        assert block_table is not None, "only a document's first tokens can do without pages"
        return block_table[requests, columns]

    return Batch(
        gather_.view(-1, width),
        valid_,
        gather_[valid_],
        pages(segments - 1) if reads else None,
        pages(segments) if has_past else None,
        past_width,
        past_mask(past_, past_width, width) if has_past else None,
    )


def _closings(
    pieces: list[OpenPiece], starts: list[int], m: int, block_table: Tensor, device: torch.device
) -> Closings:
    rows = [start + piece.n + j for start, piece in zip(starts, pieces, strict=True) for j in range(m)]
    rows_, requests, segments = upload(
        [rows, [piece.request for piece in pieces], [piece.segment for piece in pieces]], device
    )
    first = segments == 0
    return Closings(
        rows_.view(-1, m),
        block_table[requests, segments],
        block_table[requests, (segments - 1).clamp(min=0)],
        first,
    )


def run_open(stack: Stack, index: OpenIndex, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the rows of open segments.

    Args:
        stack: the model.
        index: the pieces.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the pieces' tokens are filled with the last layer's outputs.
    """
    h = torch.cat([stack.memory_tokens.to(inputs.dtype), inputs])[index.tokens]
    for layer in range(stack.layers.num_layers):
        h = _layer(stack, index, layer, h)
    outputs[index.out_rows] = h[index.out_local]


def _layer(stack: Stack, index: OpenIndex, layer: int, h: Tensor) -> Tensor:
    layers = slice(layer, layer + 1)
    pages = None if stack.pages is None else stack.pages[layer]
    h = _read(stack, index, layer, h)
    q, k, v = stack.layers.project(layers, h.unsqueeze(0), index.positions)
    o = h.new_empty(h.shape[0], q.shape[1] * q.shape[2])
    for batch in index.batches:
        q_b, k_b, v_b = batch.padded(q), batch.padded(k), batch.padded(v)
        if batch.past_pages is None:
            batch.scatter(o, attend_cells(q_b, k_b, v_b))
            continue
        assert pages is not None
        assert batch.mask is not None
        k_b = torch.cat([pages.k[:, : batch.past_width][batch.past_pages], k_b], dim=1)
        v_b = torch.cat([pages.v[:, : batch.past_width][batch.past_pages], v_b], dim=1)
        batch.scatter(o, attend_past(q_b, k_b, v_b, batch.mask))
    if index.store_rows is not None:
        assert pages is not None
        if index.opened_pages.numel():
            # columns not yet written are masked, but what a page held before may be NaN, which a mask lets through
            pages.k[index.opened_pages] = 0.0
            pages.v[index.opened_pages] = 0.0
        pages.k[index.store_pages, index.store_columns] = k[index.store_rows]
        pages.v[index.store_pages, index.store_columns] = v[index.store_rows]
    h = stack.layers.complete(layers, h.unsqueeze(0), o.unsqueeze(0)).squeeze(0)
    if index.closings is not None:
        _write(stack, index.closings, layer, h)
    return h


def _read(stack: Stack, index: OpenIndex, layer: int, h: Tensor) -> Tensor:
    """h + A for the rows that have a memory to read."""
    reading = [(batch, batch.read_pages) for batch in index.batches if batch.read_pages is not None]
    if not reading:
        return h
    assert stack.pages is not None
    pages = stack.pages[layer]
    q = stack.memory.queries(slice(layer, layer + 1), h.unsqueeze(0)).squeeze(0)
    A = torch.zeros_like(h)
    for batch, ids in reading:
        M, z = pages.M[ids].float(), pages.z[ids].float()
        batch.scatter(A, stack.memory.rule.read(batch.padded(q), M, z).to(h.dtype))
    return h + A


def _write(stack: Stack, closings: Closings, layer: int, h: Tensor) -> None:
    """Turn the pages of ending segments from keys into the memory after them."""
    assert stack.pages is not None
    pages, memory = stack.pages[layer], stack.memory
    pieces, m = closings.rows.shape
    written = memory.writes(slice(layer, layer + 1), h[closings.rows.flatten()].unsqueeze(0))
    k, v, beta = (t.view(pieces, m, -1) for t in written)
    first = closings.first
    M = pages.M[closings.read_pages].float().masked_fill_(first[:, None, None], 0.0)
    z = pages.z[closings.read_pages].float().masked_fill_(first[:, None], 0.0)
    residual, dz = memory.rule.update(k, v, beta, M, z, first)
    pages.M[closings.pages] = torch.baddbmm(M, k.transpose(1, 2), residual).to(pages.M.dtype)
    pages.z[closings.pages] = (z + dz).to(pages.z.dtype)
