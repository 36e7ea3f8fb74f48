"""Rows of open segments: decoded tokens and the ends of prompts, layer by layer over all requests.

Their keys and values go to the segment's page. A row that ends its segment brings the memory tokens
along, which vLLM never sees; they write the memory, and the page turns from keys into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_armt.executor.open_index import OpenIndex
from vllm_armt.executor.parts import Stack
from vllm_armt.linear.rows import Rows


def run_open(stack: Stack, index: OpenIndex, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the rows of open segments.

    Args:
        stack: the model.
        index: the pieces.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the pieces' tokens are filled with the last layer's outputs.
    """
    h = torch.cat([stack.system.rows_around.to(inputs.dtype), inputs])[index.tokens]
    if stack.positions is not None:
        h += stack.positions(index.positions)
    for layer in range(stack.layers.num_layers):
        rows = Rows(layer, (h.shape[0],))
        stack.system.before_open(index.system, layer, stack.pages, h)
        q, k, v = stack.layers.project(h, rows, index.positions)
        pages = None if stack.pages is None else stack.pages[layer]
        o = stack.attention.open_rows(index.attention, pages, q, k, v)
        stack.layers.complete(h, o, rows)
        stack.system.after_open(index.system, layer, stack.pages, h)
    outputs[index.out_rows] = h[index.out_local]
