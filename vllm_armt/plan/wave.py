"""A wave with its integers on the device, computed once a step and used at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import ClosedSegment, Group, Wave
from vllm_armt.plan.upload import upload


@dataclass(frozen=True)
class Entries:
    """Lanes in which a document starts at one position: from nothing, or from what is in a page."""

    empty: Tensor
    resumed: Tensor
    pages: Tensor


@dataclass(frozen=True)
class Snapshots:
    """Lanes whose state after one position is retained, and the pages that keep it."""

    lanes: Tensor
    pages: Tensor


@dataclass(frozen=True)
class WaveMetadata:
    """A wave with its integers on the device.

    Attributes:
        wave: the plan.
        rows: `[segments]`, input row of each segment's first token, in buffer order.
        numbers: `[segments]`, which segment of its document each is.
        first: bool `[segments]`, whether it is its document's very first segment.
        entries, snapshots: by position.
        ends: by the lanes of a ragged group, where the cells of its layers end, int32 `[layers]`; empty on
            devices without `grouped_mm`.
        all_outputs: whether every token's output is asked for, and not just the last one's of each segment.
    """

    wave: Wave
    rows: Tensor
    numbers: Tensor
    first: Tensor
    entries: dict[int, Entries]
    snapshots: dict[int, Snapshots]
    ends: dict[tuple[int, ...], Tensor]
    all_outputs: bool = True

    @classmethod
    def build(
        cls,
        wave: Wave,
        num_layers: int,
        has_grouped_mm: bool,
        block_table: Tensor | None,
        device: torch.device,
        all_outputs: bool = True,
    ) -> WaveMetadata:
        """Upload a wave; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        segments = wave.segments()
        rows, numbers = upload([[s.row for s in segments], [s.segment for s in segments]], device)
        entries, snapshots = {}, {}
        for q in range(wave.positions):
            column = wave.column(q)
            if any(s.enters for s in column):
                entries[q] = _entries(column, block_table, device)
            if block_table is not None and any(s.retained for s in column):
                snapshots[q] = _snapshots(column, block_table, device)
        ends = _ends(wave, num_layers, device) if has_grouped_mm else {}
        return cls(wave, rows, numbers, numbers == 0, entries, snapshots, ends, all_outputs)

    def rows_of(self, group: Group, cell_rows: int) -> Rows:
        """The rows of a group whose cells have `cell_rows` each."""
        ends = self.ends.get(group.lanes)
        counts = tuple(lanes * cell_rows for lanes in group.lanes)
        return Rows(group.first_layer, counts, None if ends is None else ends * cell_rows)

    def layers_of(self, group: Group) -> list[tuple[int, int, int]]:
        """Layer, its place in buffers of the wave's depth, and position, for each layer of a group."""
        inner = group.first_layer % self.wave.depth
        return [(group.first_layer + i, inner + i, group.last_position - i) for i in range(len(group.lanes))]


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
    retained = [lane for lane, s in enumerate(column) if s.retained]
    requests = [column[lane].request for lane in retained]
    closed = [column[lane].segment for lane in retained]
    lanes_, requests_, closed_ = upload([retained, requests, closed], device)
    return Snapshots(lanes_, block_table[requests_, closed_])
