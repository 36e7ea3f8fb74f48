"""A memory of every layer in the token stream: rows before and behind the tokens are replaced by it (PRMT).

Two recurrences are known. As intended, a layer's memory is its own output in the segment before. In the
released code a view aliases: a layer's memory is what the layer above had in the segment before, and the top
one's its own output. So what a cell (s, l) gets was used by (s-1, l+1), a cell of the same diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow, Group
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence.carried import Carried, build_carried


class PRMTRecurrence(nn.Module):
    """The recurrence of PRMT; pages hold `memory` `[m, d]`, what the layer gets in the next segment.

    Args:
        initial: `[L, m, d]`, the learned memory of a document's first segment.
        aliased: which of the two recurrences.
    """

    def __init__(self, initial: nn.Parameter, aliased: bool) -> None:
        super().__init__()
        self.initial = initial
        self.aliased = aliased
        self.flow = Flow.DIAGONAL if aliased else Flow.SAME_LAYER
        self.num_layers, self.m, _ = initial.shape

    @property
    def rows_around(self) -> Tensor:
        return torch.zeros_like(self.initial[0]).repeat(2, 1)

    def wave_state(self, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor) -> PRMTWaveState:
        return PRMTWaveState(self, metadata, pages, cells)

    def build_metadata(self, rows: TailRows, pages: LayerPages | None) -> Carried:
        return build_carried(rows)

    def before_tails(self, metadata: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        for rows, source in ((metadata.prefix, metadata.opening), (metadata.suffix, metadata.closing)):
            if source is not None:
                h[rows] = source.read(self.initial[layer], pages, layer).to(h.dtype).flatten(0, 1)

    def after_tails(self, metadata: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if metadata.closing is None:
            return
        assert pages is not None
        if self.aliased and layer + 1 < self.num_layers:
            memory = metadata.closing.read(self.initial[layer + 1], pages, layer + 1)
        else:
            memory = h[metadata.suffix].unflatten(0, (-1, self.m))
        pages[layer].state["memory"][metadata.closing.pages] = memory.to(pages[layer].state["memory"].dtype)


class PRMTWaveState:
    """The memories of a wave: `[depth + 1, width, m, d]`, by layer what the lanes' next segments get.

    With aliasing the one beyond the top layer is that layer's last output, and every cell hands on what the
    cell above it in the segment before was given. The groups of a diagonal come highest layer first.
    """

    def __init__(
        self, recurrence: PRMTRecurrence, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor
    ) -> None:
        self.recurrence = recurrence
        self.metadata = metadata
        self.pages = pages
        shape = (metadata.wave.depth + 1, metadata.wave.width, recurrence.m, cells.shape[2])
        self.memory = cells.new_zeros(shape)

    def before(self, group: Group, rows: Rows, cells: Tensor) -> None:
        m, end = self.recurrence.m, len(cells)
        layers = zip(self.metadata.layers_of(group), group.lanes, strict=True)
        for (layer, inner, q), count in reversed(list(layers)):
            memory = self.memory[inner, :count]
            if self.recurrence.aliased:
                memory.copy_(self.memory[inner + 1, :count])
            self._enter(memory, layer, q)
            if self.recurrence.aliased and layer > 0:
                self._keep(self.memory[inner], layer - 1, q)
            begin = end - count
            cells[begin:end, :m] = memory
            cells[begin:end, -m:] = memory
            end = begin

    def after(self, group: Group, cells: Tensor) -> None:
        first = 0
        for (layer, inner, q), count in zip(self.metadata.layers_of(group), group.lanes, strict=True):
            is_top = layer == self.recurrence.num_layers - 1
            if is_top or not self.recurrence.aliased:
                target = inner + 1 if self.recurrence.aliased else inner
                self.memory[target, :count] = cells[first : first + count, -self.recurrence.m :]
                self._keep(self.memory[target], layer, q)
            first += count

    def _enter(self, memory: Tensor, layer: int, q: int) -> None:
        """Give the lanes of documents that start at position q what they start with."""
        if (entry := self.metadata.entries.get(q)) is None:
            return
        memory[entry.empty] = self.recurrence.initial[layer].to(memory.dtype)
        if entry.resumed.numel():
            assert self.pages is not None
            memory[entry.resumed] = self.pages[layer].state["memory"][entry.pages].to(memory.dtype)

    def _keep(self, memory: Tensor, layer: int, q: int) -> None:
        """Leave the memory after retained segments in their pages."""
        if (retained := self.metadata.snapshots.get(q)) is not None:
            assert self.pages is not None
            target = self.pages[layer].state["memory"]
            target[retained.pages] = memory[retained.lanes].to(target.dtype)
