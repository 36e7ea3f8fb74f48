"""Rows of open segments: decoded tokens and the ends of prompts, layer by layer over all requests.

Their keys and values go to the segment's page. A row that ends its segment brings the m memory tokens
along, which vLLM never sees; they write the memory, and the page turns from keys into memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.core.memory import MemoryRule
from vllm_armt.diagonal.open_index import Closings, OpenIndex, Reads
from vllm_armt.diagonal.rows import Rows
from vllm_armt.diagonal.stack import Stack

BAGS = 6
"""Parts in which a single row reads M, so that one request occupies several threads; K is a multiple."""


def run_open(stack: Stack, index: OpenIndex, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the rows of open segments.

    Args:
        stack: the model.
        index: the pieces.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the pieces' tokens are filled with the last layer's outputs.
    """
    h = torch.cat([stack.memory_tokens.to(inputs.dtype), inputs])[index.tokens]
    bags = [None if reads.width > 1 else _bags(stack, reads) for reads in index.reads]
    for layer in range(stack.layers.num_layers):
        rows = Rows(layer, (h.shape[0],))
        pages = None if stack.pages is None else stack.pages[layer]
        if index.reads:
            assert pages is not None
            q = stack.memory.queries(h, rows)
            for reads, bag in zip(index.reads, bags, strict=True):
                reads.add(h, _read(stack.memory.rule, reads, bag, pages, q).to(h.dtype))
        q, k, v = stack.layers.project(h, rows, index.positions)
        o = stack.attention.open_rows(index.attention, pages, q, k, v)
        stack.layers.complete(h, o, rows)
        if index.closings is not None:
            assert pages is not None
            _write(stack, index.closings, pages, h, layer)
    outputs[index.out_rows] = h[index.out_local]


def _bags(stack: Stack, reads: Reads) -> Tensor:
    """Where single rows find the rows of M in the pool, `[pieces * BAGS, K / BAGS]`; the same at every layer."""
    assert stack.pages is not None
    first_rows = reads.pages.long().unsqueeze(1) * stack.pages[0].page_rows
    K = stack.memory.feature_size
    return (first_rows + torch.arange(K, device=first_rows.device)).view(-1, K // BAGS)


def _read(rule: MemoryRule, reads: Reads, bags: Tensor | None, pages: LayerPages, q: Tensor) -> Tensor:
    """What pieces find in the memories before their segments.

    Single rows read M where it lies: as a sum of its rows, weighted. Longer pieces multiply a copy.

    Args:
        rule: of the memory.
        reads: n pieces.
        bags: of single rows.
        pages: of the layer.
        q: features of all local rows, `[rows, K]`.

    Returns:
        A `[n, width, d]`.
    """
    q, z = reads.gather(q), pages.z[reads.pages]
    if bags is None:
        return rule.read(q, pages.M[reads.pages].to(q.dtype), z)
    weights = rule.weights(q, z).view(bags.shape).to(pages.rows.dtype)
    parts = F.embedding_bag(bags, pages.rows, per_sample_weights=weights, mode="sum")
    return parts.unflatten(0, (-1, BAGS)).sum(1, keepdim=True, dtype=torch.float32)


def _write(stack: Stack, closings: Closings, pages: LayerPages, h: Tensor, layer: int) -> None:
    """Turn the pages of ending segments from keys into the memory after them."""
    memory = stack.memory
    pieces, m = closings.rows.shape
    written = memory.writes(h[closings.rows.flatten()], Rows(layer, (pieces * m,)))
    k, v, beta = (t.view(pieces, m, -1) for t in written)
    first = closings.first
    M = pages.M[closings.read_pages].float().masked_fill_(first[:, None, None], 0.0)
    z = pages.z[closings.read_pages].float().masked_fill_(first[:, None], 0.0)
    residual, dz = memory.rule.update(k, v, beta, k @ M, z, first)
    pages.M[closings.pages] = M.baddbmm_(k.transpose(1, 2), residual).to(pages.M.dtype)
    pages.z[closings.pages] = z.add_(dz).to(pages.z.dtype)
