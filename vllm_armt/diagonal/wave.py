"""The wave: closed segments of several documents, swept diagonal by diagonal over the layers.

The hidden states of all segments lie in one buffer in the order in which they leave the wave, so the
cells of a diagonal are a contiguous slice at every layer and rolling on to the next diagonal moves
nothing. The memories under way live in float32 working buffers; a page is read where a document
enters its lane and written only for the snapshots that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.diagonal.attention import attend_cells
from vllm_armt.diagonal.plan import ClosedSegment, Group, Wave
from vllm_armt.diagonal.stack import Stack, upload


@dataclass(frozen=True)
class Entries:
    """Lanes in which a document starts at one position: with an empty memory, or with one from a page."""

    empty: Tensor
    resumed: Tensor
    pages: Tensor


@dataclass(frozen=True)
class Snapshots:
    """Lanes whose memory after one position is kept, and the pages that keep it."""

    lanes: Tensor
    pages: Tensor


@dataclass(frozen=True)
class WaveIndex:
    """A wave with its integers on the device.

    Attributes:
        wave: the plan.
        rows: `[segments]`, input row of each segment's first token, in buffer order.
        first: bool `[segments]`, whether it is its document's very first segment.
        entries, snapshots: by position.
    """

    wave: Wave
    rows: Tensor
    first: Tensor
    entries: dict[int, Entries]
    snapshots: dict[int, Snapshots]

    @classmethod
    def build(cls, wave: Wave, block_table: Tensor | None, device: torch.device) -> WaveIndex:
        """Upload a wave; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        segments = wave.segments()
        rows, first = upload([[s.row for s in segments], [int(s.segment == 0) for s in segments]], device)
        entries, snapshots = {}, {}
        for q in range(wave.positions):
            column = wave.column(q)
            if any(s.enters for s in column):
                entries[q] = _entries(column, block_table, device)
            if block_table is not None and any(s.kept for s in column):
                snapshots[q] = _snapshots(column, block_table, device)
        return cls(wave, rows, first.bool(), entries, snapshots)


def _entries(column: list[ClosedSegment], block_table: Tensor | None, device: torch.device) -> Entries:
    empty = [lane for lane, s in enumerate(column) if s.enters and s.segment == 0]
    resumed = [lane for lane, s in enumerate(column) if s.enters and s.segment > 0]
    requests = [column[lane].request for lane in resumed]
    previous = [column[lane].segment - 1 for lane in resumed]
    empty_, resumed_, requests_, previous_ = upload([empty, resumed, requests, previous], device)
    return Entries(empty_, resumed_, previous_ if block_table is None else block_table[requests_, previous_])


def _snapshots(column: list[ClosedSegment], block_table: Tensor, device: torch.device) -> Snapshots:
    kept = [lane for lane, s in enumerate(column) if s.kept]
    requests = [column[lane].request for lane in kept]
    closed = [column[lane].segment for lane in kept]
    lanes_, requests_, closed_ = upload([kept, requests, closed], device)
    return Snapshots(lanes_, block_table[requests_, closed_])


def run_wave(stack: Stack, index: WaveIndex, inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the closed segments of a step.

    Args:
        stack: the model.
        index: the wave.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of the wave's tokens are filled with the last layer's outputs.
    """
    S = stack.segment_size
    token_rows = (index.rows.unsqueeze(1) + torch.arange(S, device=index.rows.device)).flatten()
    segments, m = index.rows.shape[0], stack.memory_tokens.shape[0]
    h = inputs.new_empty(segments, S + m, inputs.shape[1])
    h[:, :S] = inputs[token_rows].unflatten(0, (segments, S))
    h[:, S:] = stack.memory_tokens
    _sweep(stack, index, h)
    outputs[token_rows] = h[:, :S].flatten(0, 1)


def _sweep(stack: Stack, index: WaveIndex, h: Tensor) -> None:
    """Bring `h` `[segments, T, d]` from embeddings to the last layer's outputs, in place."""
    wave, memory = index.wave, stack.memory
    T, d = h.shape[1:]
    m = stack.memory_tokens.shape[0]
    K = memory.feature_size
    lanes_M = h.new_empty(wave.depth, wave.width, K, d, dtype=torch.float32)
    lanes_z = h.new_empty(wave.depth, wave.width, K, dtype=torch.float32)
    positions = torch.arange(T, device=h.device).repeat(wave.depth * wave.width)
    for group in wave.groups(stack.layers.num_layers):
        n, c = group.layers, group.lanes
        layers = slice(group.first_layer, group.first_layer + n)
        inner = slice(group.first_layer % wave.depth, group.first_layer % wave.depth + n)
        _enter(stack, index, group, lanes_M, lanes_z)
        M, z = lanes_M[inner, :c], lanes_z[inner, :c]
        begin, end = wave.span(group)

        x = h[begin:end].view(n, c * T, d)
        q = memory.queries(layers, x).unflatten(1, (c, T))
        x = x + memory.rule.read(q, M, z).flatten(1, 2).to(x.dtype)
        q, k, v = (t.unflatten(0, (n * c, T)) for t in stack.layers.project(layers, x, positions[: n * c * T]))
        o = attend_cells(q, k, v).view(n, c * T, -1)
        y = stack.layers.complete(layers, x, o).view(n * c, T, d)
        h[begin:end] = y

        written = y.view(n, c, T, d)[:, :, T - m :].flatten(1, 2)
        k, v, beta = (t.unflatten(1, (c, m)) for t in memory.writes(layers, written))
        residual, dz = memory.rule.update(k, v, beta, M, z, index.first[begin:end].view(n, c))
        M += k.transpose(-1, -2) @ residual
        z += dz
        _keep(stack, index, group, lanes_M, lanes_z)


def _enter(stack: Stack, index: WaveIndex, group: Group, lanes_M: Tensor, lanes_z: Tensor) -> None:
    """Give the lanes of documents that start in this group the memory that they start with."""
    for layer, inner, q in _cells(group, index.wave.depth):
        if (entry := index.entries.get(q)) is None:
            continue
        lanes_M[inner].index_fill_(0, entry.empty, 0.0)
        lanes_z[inner].index_fill_(0, entry.empty, 0.0)
        if entry.resumed.numel():
            assert stack.pages is not None
            pages = stack.pages[layer]
            lanes_M[inner].index_copy_(0, entry.resumed, pages.M[entry.pages].float())
            lanes_z[inner].index_copy_(0, entry.resumed, pages.z[entry.pages].float())


def _keep(stack: Stack, index: WaveIndex, group: Group, lanes_M: Tensor, lanes_z: Tensor) -> None:
    """Write the memories that this group leaves in kept segments to their pages."""
    for layer, inner, q in _cells(group, index.wave.depth):
        if (kept := index.snapshots.get(q)) is None:
            continue
        assert stack.pages is not None
        pages = stack.pages[layer]
        pages.M[kept.pages] = lanes_M[inner][kept.lanes].to(pages.M.dtype)
        pages.z[kept.pages] = lanes_z[inner][kept.lanes].to(pages.z.dtype)


def _cells(group: Group, depth: int) -> list[tuple[int, int, int]]:
    """Layer, its index in the working buffers, and position, for each layer of a group."""
    return [
        (group.first_layer + i, group.first_layer % depth + i, group.last_position - i) for i in range(group.layers)
    ]
