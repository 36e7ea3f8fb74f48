"""Rows of open segments: decoded tokens and the ends of prompts, layer by layer over all requests.

Their keys and values go to the segment's page. A row that ends its segment brings the m memory tokens
along, which vLLM never sees; they write the memory, and the page turns from keys into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.diagonal.attention import attend_cells, attend_past
from vllm_armt.diagonal.open_index import Closings, OpenIndex, Stores
from vllm_armt.diagonal.stack import Stack


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
    if index.stores is not None:
        assert pages is not None
        _store(pages, index.stores, k, v)
    h = stack.layers.complete(layers, h.unsqueeze(0), o.unsqueeze(0)).squeeze(0)
    if index.closings is not None:
        _write(stack, index.closings, layer, h)
    return h


def _store(pages: LayerPages, stores: Stores, k: Tensor, v: Tensor) -> None:
    for target, source in ((pages.k, k), (pages.v, v)):
        if stores.opened_pages.numel():
            # columns not yet written are masked, but what a page held before may be NaN, which a mask lets through
            target[stores.opened_pages] = 0.0
        target[stores.pages, stores.columns] = source[stores.rows]


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
