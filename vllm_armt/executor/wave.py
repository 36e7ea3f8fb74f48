"""The wave: closed segments of several documents, swept over the layers group by group.

The hidden states of all segments lie in one buffer in the order in which they leave the wave, so the
cells of a diagonal are a contiguous slice at every layer and rolling on to the next diagonal moves
nothing. What flows lives in working buffers; a page is read where a document enters its lane and written
only for the snapshots that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_armt.attention.window import WindowLanes
from vllm_armt.executor.parts import Stack
from vllm_armt.plan.upload import upload
from vllm_armt.plan.wave import WaveIndex


def run_wave(stack: Stack, index: WaveIndex, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the closed segments of a step.

    Args:
        stack: the model.
        index: the wave.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the wave's tokens are filled with the last layer's outputs.
    """
    cell, segments = stack.cell, index.rows.shape[0]
    begin, end = cell.prefix, cell.prefix + cell.tokens
    token_rows = (index.rows.unsqueeze(1) + torch.arange(cell.tokens, device=index.rows.device)).flatten()
    h = inputs.new_empty(segments, cell.rows, inputs.shape[1])
    h[:, begin:end] = inputs[token_rows].unflatten(0, (segments, cell.tokens))
    h[:, :begin] = stack.system.rows_around[:begin]
    h[:, end:] = stack.system.rows_around[begin:]
    _sweep(stack, index, h)
    outputs[token_rows] = h[:, begin:end].flatten(0, 1)


def _sweep(stack: Stack, index: WaveIndex, h: Tensor) -> None:
    """Bring `h` `[segments, T, d]` from embeddings to the last layer's outputs, in place."""
    wave, (_, T, d) = index.wave, h.shape
    (own,) = upload([stack.cell.positions(0, 0, stack.cell.tokens, True)], h.device)
    if stack.positions is not None:
        h += stack.positions(own + (index.numbers * stack.cell.stride).unsqueeze(1))
    positions = own.repeat(min(wave.depth * wave.width, h.shape[0]))
    states = stack.system.states(index, stack.pages, h)
    window = None if stack.window is None else WindowLanes(stack.window, stack.cell, index, stack.pages)
    for group in wave.groups(stack.layers.num_layers):
        begin, end = wave.span(group)
        cells = h[begin:end]
        x = cells.view(-1, d)
        rows = index.rows_of(group, T)
        states.before(group, rows, cells)
        q, k, v = stack.layers.project(x, rows, positions[: x.shape[0]])
        past = None if window is None else window.past(group, k, v)
        o = stack.attention.cells(q, k, v, T, past)
        stack.layers.complete(x, o, rows)
        states.after(group, cells)
