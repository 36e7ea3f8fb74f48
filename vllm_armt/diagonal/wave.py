"""The wave: closed segments of several documents, swept diagonal by diagonal over the layers.

The hidden states of all segments lie in one buffer in the order in which they leave the wave, so the
cells of a diagonal are a contiguous slice at every layer and rolling on to the next diagonal moves
nothing. The memories under way live in float32 working buffers; a page is read where a document
enters its lane and written only for the snapshots that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vllm_armt.diagonal.lanes import Lanes
from vllm_armt.diagonal.plan import ClosedSegment, Group, Wave
from vllm_armt.diagonal.rows import Rows
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.upload import upload


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
        ends: by the lanes of a ragged group, where the cells of its layers end, int32 `[layers]`; empty on
            devices without a grouped product.
    """

    wave: Wave
    rows: Tensor
    first: Tensor
    entries: dict[int, Entries]
    snapshots: dict[int, Snapshots]
    ends: dict[tuple[int, ...], Tensor]

    @classmethod
    def build(
        cls,
        wave: Wave,
        num_layers: int,
        has_grouped_product: bool,
        block_table: Tensor | None,
        device: torch.device,
    ) -> WaveIndex:
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
        ends = _ends(wave, num_layers, device) if has_grouped_product else {}
        return cls(wave, rows, first.bool(), entries, snapshots, ends)

    def rows_of(self, group: Group, cell_rows: int) -> Rows:
        """The rows of a group whose cells have so many."""
        ends = self.ends.get(group.lanes)
        counts = tuple(lanes * cell_rows for lanes in group.lanes)
        return Rows(group.first_layer, counts, None if ends is None else ends * cell_rows)


def _ends(wave: Wave, num_layers: int, device: torch.device) -> dict[tuple[int, ...], Tensor]:
    """By lanes, where the cells of each layer end, for the ragged groups of a wave."""
    ragged = sorted({group.lanes for group in wave.groups(num_layers) if len(set(group.lanes)) > 1})
    uploaded = upload([list(accumulate(lanes)) for lanes in ragged], device)
    return {lanes: ends.int() for lanes, ends in zip(ragged, uploaded, strict=True)}


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
    lanes = Lanes(wave, memory.feature_size, d, m, h.dtype, h.device)
    positions = torch.arange(T, device=h.device).repeat(wave.depth * wave.width)
    for group in wave.groups(stack.layers.num_layers):
        begin, end = wave.span(group)
        cells = h[begin:end]
        x = cells.view(-1, d)
        rows = index.rows_of(group, T)
        _enter(stack, index, group, lanes)
        runs = lanes.runs(group)

        q = memory.queries(x, rows).view(-1, T, memory.feature_size)
        for run in runs:
            run.read(memory.rule, q[run.cells], cells[run.cells])
        q, k, v = stack.layers.project(x, rows, positions[: x.shape[0]])
        o = stack.attention.cells(q, k, v, T)
        stack.layers.complete(x, o, rows)

        written = memory.writes(cells[:, T - m :].reshape(-1, d), index.rows_of(group, m))
        k, v, beta = (t.view(-1, m, t.shape[-1]) for t in written)
        first = index.first[begin:end]
        for run in runs:
            run.write(memory.rule, k[run.cells], v[run.cells], beta[run.cells], first[run.cells])
        _keep(stack, index, group, lanes)


def _enter(stack: Stack, index: WaveIndex, group: Group, lanes: Lanes) -> None:
    """Give the lanes of documents that start in this group the memory that they start with."""
    for layer, inner, q in _layers(group, index.wave.depth):
        if (entry := index.entries.get(q)) is None:
            continue
        lanes.enter(inner, entry.empty, None, None)
        if entry.resumed.numel():
            assert stack.pages is not None
            pages = stack.pages[layer]
            lanes.enter(inner, entry.resumed, pages.M[entry.pages], pages.z[entry.pages])


def _keep(stack: Stack, index: WaveIndex, group: Group, lanes: Lanes) -> None:
    """Write the memories that this group leaves in kept segments to their pages."""
    collected = (lanes.collected(group) + lanes.m) % (lanes.writes * lanes.m)
    for layer, inner, q in _layers(group, index.wave.depth):
        if (kept := index.snapshots.get(q)) is None:
            continue
        assert stack.pages is not None
        pages = stack.pages[layer]
        M, z = lanes.memory(inner, kept.lanes, collected)
        pages.M[kept.pages] = M.to(pages.M.dtype)
        pages.z[kept.pages] = z.to(pages.z.dtype)


def _layers(group: Group, depth: int) -> list[tuple[int, int, int]]:
    """Layer, its index in the working buffers, and position, for each layer of a group."""
    inner = group.first_layer % depth
    return [(group.first_layer + i, inner + i, group.last_position - i) for i in range(len(group.lanes))]
