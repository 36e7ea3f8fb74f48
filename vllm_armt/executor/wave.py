"""The wave: closed segments of several documents, swept over the layers group by group.

The hidden states of all segments lie in one buffer in the order in which they leave the wave, so the
cells of a diagonal are a contiguous slice at every layer and rolling on to the next diagonal moves
nothing. What flows lives in working buffers; a page is read where a document enters its lane and written
only for the snapshots that are retained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_armt.attention.window import WindowLanes
from vllm_armt.executor.parts import ModelParts
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.upload import upload
from vllm_armt.plan.wave import WaveMetadata

SPLIT_ROWS = {"cpu": 0, "cuda": 8192}
"""Rows of a group from which on its last layer is worth a forward of its own; reckoned for CUDA, not measured.

A second forward takes a dozen kernels more, which a group that waits for launches anyway does not earn."""


def run_wave(parts: ModelParts, metadata: WaveMetadata, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the closed segments of a step.

    Args:
        parts: the model.
        metadata: the wave.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the wave's tokens are filled with the last layer's outputs, or where
            not all are asked for those of each segment's last token.
    """
    layout, segments = parts.layout, metadata.rows.shape[0]
    begin, end = layout.prefix, layout.prefix + layout.tokens
    token_rows = (metadata.rows.unsqueeze(1) + torch.arange(layout.tokens, device=metadata.rows.device)).flatten()
    h = inputs.new_empty(segments, layout.rows, inputs.shape[1])
    h[:, begin:end] = inputs[token_rows].unflatten(0, (segments, layout.tokens))
    h[:, :begin] = parts.recurrence.rows_around[:begin]
    h[:, end:] = parts.recurrence.rows_around[begin:]
    _sweep(parts, metadata, h)
    if metadata.all_outputs:
        outputs[token_rows] = h[:, begin:end].flatten(0, 1)
    else:
        outputs[metadata.rows + (layout.tokens - 1)] = h[:, end - 1]


def _sweep(parts: ModelParts, metadata: WaveMetadata, h: Tensor) -> None:
    """Bring `h` `[segments, T, d]` from embeddings to the last layer's outputs, in place."""
    wave, (_, T, d) = metadata.wave, h.shape
    (own,) = upload([parts.layout.positions(0, 0, parts.layout.tokens, True)], h.device)
    if parts.positions is not None:
        h += parts.positions(own + (metadata.numbers * parts.layout.stride).unsqueeze(1))
    positions = own.repeat(min(wave.depth * wave.width, h.shape[0]))
    state = parts.recurrence.wave_state(metadata, parts.pages, h)
    window = None
    if parts.window is not None:
        window = WindowLanes(parts.window, parts.layout, metadata, parts.pages, parts.move)
    for group in wave.groups(parts.layers.num_layers):
        begin, end = wave.span(group)
        cells = h[begin:end]
        x = cells.view(-1, d)
        rows = metadata.rows_of(group, T)
        state.before(group, rows, cells)
        q, k, v = parts.layers.project(x, rows, positions[: x.shape[0]])
        past = None if window is None else window.past(group, k, v)
        o = parts.attention.attend_cells(q, k, v, rows, T, past)
        _complete(parts, metadata, cells, o, rows)
        state.after(group, cells)


def _complete(parts: ModelParts, metadata: WaveMetadata, cells: Tensor, o: Tensor, rows: Rows) -> None:
    """Turn a group's cells `[cells, T, d]` into its layers' outputs, in place.

    Of the last layer's outputs only those that someone looks at are computed: the suffix, which writes the memory,
    and the last token, behind which one is sampled.
    """
    n, T, d = cells.shape
    used = 1 + parts.layout.suffix
    begin = n - rows.counts[-1] // T
    is_small = begin > 0 and n * T < SPLIT_ROWS.get(cells.device.type, SPLIT_ROWS["cuda"])
    if metadata.all_outputs or is_small or rows.last_layer < parts.layers.num_layers - 1:
        parts.layers.complete(cells.view(-1, d), o, rows)
        return
    if begin:
        parts.layers.complete(cells[:begin].view(-1, d), o[: begin * T], rows.without_last())
    last = cells[begin:, -used:].clone(memory_format=torch.contiguous_format).view(-1, d)
    attended = o[begin * T :].view(n - begin, T, -1)[:, -used:].reshape(len(last), -1)
    parts.layers.complete(last, attended, Rows(rows.last_layer, (len(last),)))
    cells[begin:, -used:] = last.view(n - begin, used, d)
