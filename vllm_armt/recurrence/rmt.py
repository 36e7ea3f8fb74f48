"""The memory of the top layer in the token stream: what it leaves enters the first layer of the next segment (RMT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow, Group
from vllm_armt.plan.tails import LocalRows
from vllm_armt.plan.wave import WaveIndex
from vllm_armt.recurrence.carried import Carried, index_carried


class TopMemory(nn.Module):
    """The system of RMT; pages of the last layer hold `memory` `[m, d]`, the others' are not used.

    Position embeddings are added to memory as to tokens, so it is added to rows that are zero before.

    Args:
        initial: `[m, d]`, the learned memory of a document's first segment.
        num_layers: L.
        norm: the final norm, which the memory passes on its way.
    """

    flow = Flow.TOP_LAYER

    def __init__(self, initial: nn.Parameter, num_layers: int, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.initial = initial
        self.m = initial.shape[0]
        self.top = num_layers - 1
        self.norm = norm

    @property
    def rows_around(self) -> Tensor:
        return torch.zeros_like(self.initial).repeat(2, 1)

    def states(self, index: WaveIndex, pages: Sequence[LayerPages] | None, cells: Tensor) -> TopStates:
        return TopStates(self, index, pages, cells)

    def open_index(self, rows: LocalRows) -> Carried:
        return index_carried(rows)

    def before_open(self, index: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if layer > 0:
            return
        for rows, source in ((index.prefix, index.opening), (index.suffix, index.closing)):
            if source is not None:
                h[rows] += source.read(self.initial, pages, self.top).to(h.dtype).flatten(0, 1)

    def after_open(self, index: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if layer < self.top or index.closing is None:
            return
        assert pages is not None
        target = pages[layer].state["memory"]
        target[index.closing.pages] = self.norm(h[index.suffix]).unflatten(0, (-1, self.m)).to(target.dtype)


class TopStates:
    """The memories of a wave: `[width, m, d]`, by lane what its next segment gets."""

    def __init__(self, system: TopMemory, index: WaveIndex, pages: Sequence[LayerPages] | None, cells: Tensor) -> None:
        self.system = system
        self.index = index
        self.pages = pages
        self.memory = cells.new_zeros(index.wave.width, system.m, cells.shape[2])

    def before(self, group: Group, rows: Rows, cells: Tensor) -> None:
        if group.first_layer > 0:
            return
        if (entry := self.index.entries.get(group.last_position)) is not None:
            self.memory[entry.empty] = self.system.initial.to(self.memory.dtype)
            if entry.resumed.numel():
                assert self.pages is not None
                stored = self.pages[self.system.top].state["memory"]
                self.memory[entry.resumed] = stored[entry.pages].to(self.memory.dtype)
        memory = self.memory[: len(cells)]
        cells[:, : self.system.m] += memory
        cells[:, -self.system.m :] += memory

    def after(self, group: Group, cells: Tensor) -> None:
        if group.first_layer < self.system.top:
            return
        self.memory[: len(cells)] = self.system.norm(cells[:, -self.system.m :].contiguous())
        if (kept := self.index.snapshots.get(group.last_position)) is not None:
            assert self.pages is not None
            target = self.pages[self.system.top].state["memory"]
            target[kept.pages] = self.memory[kept.lanes].to(target.dtype)
