"""The step plan: what one forward computes and in which order, from host integers alone.

Closed segments (whole ones) go into lanes, a lane holding whole documents in turn, and are swept diagonal by
diagonal. Everything else is a piece of an open segment and needs the keys in its page.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from vllm_armt.core import Segmentation


class Flow(Enum):
    """What a cell (segment s, layer l) takes from the segment before, besides the layer below in its own."""

    SAME_LAYER = auto()
    """(s-1, l): layers may be swept in blocks of any depth."""
    DIAGONAL = auto()
    """Cells of the diagonals before, at any layer: all layers are swept at once, or segment by segment."""
    TOP_LAYER = auto()
    """(s-1, L-1): a document's segments run one after another."""


class Chunk(NamedTuple):
    """The tokens `[start, end)` of one request that this step computes; its first is input row `row`."""

    request: int
    row: int
    start: int
    end: int
    segmentation: Segmentation


class ClosedSegment(NamedTuple):
    """A whole segment of this step.

    Attributes:
        request, segment, row: whose segment, which one, and the input row of its first token.
        enters: it is the first of its document in this step, so its lane takes over that document's memory.
        retained: the memory after it goes to its page.
    """

    request: int
    segment: int
    row: int
    enters: bool
    retained: bool


class Tail(NamedTuple):
    """Tokens of a segment that is not computed as a whole in this step.

    The rows before a segment's tokens come with its first ones, the memory tokens behind them if it `closes`.
    """

    request: int
    segment: int
    offset: int
    n: int
    row: int
    closes: bool


@dataclass(frozen=True)
class Group:
    """Cells of a diagonal that run as one grouped forward: consecutive layers, one position each.

    Layer `first_layer + i` is met by the segments at position `last_position - i` of lanes `[0, lanes[i])`.
    Where a lane has ended, the layers that it has left are wider than those before.
    """

    first_layer: int
    last_position: int
    lanes: tuple[int, ...]

    @property
    def cells(self) -> int:
        return sum(self.lanes)


@dataclass(frozen=True)
class Wave:
    """The closed segments of a step in lanes, longest lane first.

    Attributes:
        lanes: no more than `max_cells`.
        depth: layers swept at a time.
        max_cells: of a grouped forward.
        by_segment: every position passes all layers before the next one enters, instead of diagonals.
    """

    lanes: list[list[ClosedSegment]]
    depth: int
    max_cells: int
    by_segment: bool = False
    counts: list[int] = field(init=False)
    """Per position, how many lanes reach it; they are the first ones."""
    offsets: list[int] = field(init=False)
    """Per position, where its segments start in buffer order: last position first, so that the
    segments of a diagonal, lowest layer first, are neighbours in memory at every layer."""

    def __post_init__(self) -> None:
        counts = [sum(len(lane) > q for lane in self.lanes) for q in range(len(self.lanes[0]))]
        offsets, total = [0] * len(counts), 0
        for q in reversed(range(len(counts))):
            offsets[q], total = total, total + counts[q]
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "offsets", offsets)

    @property
    def positions(self) -> int:
        return len(self.counts)

    @property
    def width(self) -> int:
        return len(self.lanes)

    def column(self, q: int) -> list[ClosedSegment]:
        """The segments at position q, by lane."""
        return [lane[q] for lane in self.lanes[: self.counts[q]]]

    def segments(self) -> list[ClosedSegment]:
        """All segments in buffer order."""
        return [segment for q in reversed(range(self.positions)) for segment in self.column(q)]

    def span(self, group: Group) -> tuple[int, int]:
        """The group's segments in buffer order, `[begin, end)`."""
        begin = self.offsets[group.last_position]
        return begin, begin + group.cells

    def groups(self, num_layers: int) -> Iterator[Group]:
        """Every cell once, after the cells it depends on: (s, l-1) and (s-1, l).

        Blocks of `depth` layers are swept one after another, each diagonal by diagonal: depth 1 is the
        sequential order, depth `num_layers` the full diagonal. A diagonal of more than `max_cells` is cut
        into several groups, its highest layers first: its cells are independent.
        """
        if self.by_segment:
            for q, count in enumerate(self.counts):
                for layer in range(num_layers):
                    yield Group(layer, q, (count,))
            return
        for block in range(0, num_layers, self.depth):
            depth = min(self.depth, num_layers - block)
            for diagonal in range(self.positions + depth - 1):
                first = max(0, diagonal - self.positions + 1)
                end, cells = min(depth, diagonal + 1), 0
                for j in reversed(range(first, end)):
                    count = self.counts[diagonal - j]
                    if cells + count > self.max_cells:
                        yield self._group(block, diagonal, j + 1, end)
                        end, cells = j + 1, 0
                    cells += count
                yield self._group(block, diagonal, first, end)

    def _group(self, block: int, diagonal: int, begin: int, end: int) -> Group:
        """Layers [begin, end) of a block on a diagonal."""
        return Group(block + begin, diagonal - begin, tuple(self.counts[diagonal - j] for j in range(begin, end)))


@dataclass(frozen=True)
class StepPlan:
    """What a step computes: first the wave, then the tails, which read what the wave has written.

    Tails are the pieces of open segments: decoded tokens and the ends of prompts.
    """

    wave: Wave | None
    tails: list[Tail]


@dataclass(frozen=True)
class Schedule:
    """How wide and deep a wave runs.

    Attributes:
        mode: "diagonal" sweeps all layers at once, "sequential" one at a time, "auto" as many as fill
            the device.
        target_rows: rows of a grouped forward beyond which the device gains nothing from more.
        num_layers: L.
        segment_size, cell_rows: S, and T with the rows around it.
        flow: what decides which orders are right.
    """

    mode: str
    target_rows: int
    num_layers: int
    segment_size: int
    cell_rows: int
    flow: Flow = Flow.SAME_LAYER

    @property
    def max_cells(self) -> int:
        """Cells of a grouped forward."""
        return max(1, self.target_rows // self.cell_rows)

    def wave(self, documents: list[list[ClosedSegment]]) -> Wave:
        """Put documents into lanes: the longest first, each into the shortest lane."""
        by_segment = self.flow is Flow.TOP_LAYER or (self.flow is Flow.DIAGONAL and self.mode == "sequential")
        width, depth = self._shape(len(documents), by_segment)
        lanes: list[list[ClosedSegment]] = [[] for _ in range(width)]
        heap = [(0, i) for i in range(width)]
        for document in sorted(documents, key=len, reverse=True):
            length, i = heapq.heappop(heap)
            lanes[i].extend(document)
            heapq.heappush(heap, (length + len(document), i))
        return Wave(sorted(lanes, key=len, reverse=True), depth, self.max_cells, by_segment)

    def _shape(self, documents: int, by_segment: bool) -> tuple[int, int]:
        """Number of lanes, and layers swept at a time, for a number of documents."""
        if by_segment:
            return min(documents, self.max_cells), self.num_layers
        if self.mode == "diagonal" or self.flow is Flow.DIAGONAL:
            return max(1, min(documents, self.max_cells // self.num_layers)), self.num_layers
        width = min(documents, self.max_cells)
        return width, 1 if self.mode == "sequential" else min(self.num_layers, -(-self.max_cells // width))


def plan_step(chunks: Sequence[Chunk], schedule: Schedule) -> StepPlan:
    """Plan a step; work is proportional to the number of segments that the chunks touch.

    Segments of S tokens that a chunk covers as a whole form the wave; everything else is a tail.

    Raises:
        ValueError: a chunk needs a segment that is a tail before the chunk's end.
    """
    tails: list[Tail] = []
    documents: list[list[ClosedSegment]] = []
    for chunk in chunks:
        retained = chunk.segmentation.retained(chunk.end, schedule.segment_size)
        row = chunk.row
        document: list[ClosedSegment] = []
        pieces = chunk.segmentation.split(chunk.start, chunk.end)
        for piece in pieces:
            if piece.is_whole and piece.n == schedule.segment_size:
                document.append(
                    ClosedSegment(chunk.request, piece.segment, row, not document, piece.segment in retained)
                )
            elif piece is pieces[-1]:
                tails.append(Tail(chunk.request, piece.segment, piece.offset, piece.n, row, piece.closes))
            else:
                raise ValueError(
                    f"Tokens [{chunk.start}, {chunk.end}) of a request start with a part of a segment of "
                    f"{schedule.segment_size} tokens and go past its end; the scheduler must stop there."
                )
            row += piece.n
        if document:
            documents.append(document)
    return StepPlan(schedule.wave(documents) if documents else None, tails)
