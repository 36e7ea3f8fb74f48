"""The memory of the top layer in the token stream: what it leaves enters the first layer of the next segment (RMT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow, Group
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence.carried import Carried, build_carried


class RMTRecurrence(nn.Module):
    """The recurrence of RMT; pages of the last layer hold `memory` `[m, d]`, the others' are not used.

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

    def wave_state(self, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor) -> RMTWaveState:
        return RMTWaveState(self, metadata, pages, cells)

    def build_metadata(self, rows: TailRows, pages: LayerPages | None) -> Carried:
        return build_carried(rows)

    def before_tails(self, metadata: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if layer > 0:
            return
        for rows, source in ((metadata.prefix, metadata.opening), (metadata.suffix, metadata.closing)):
            if source is not None:
                h[rows] += source.read(self.initial, pages, self.top).to(h.dtype).flatten(0, 1)

    def after_tails(self, metadata: Carried, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if layer < self.top or metadata.closing is None:
            return
        assert pages is not None
        target = pages[layer].state["memory"]
        target[metadata.closing.pages] = self.norm(h[metadata.suffix]).unflatten(0, (-1, self.m)).to(target.dtype)


class RMTWaveState:
    """The memories of a wave: `[width, m, d]`, by lane what its next segment gets."""

    def __init__(
        self, recurrence: RMTRecurrence, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor
    ) -> None:
        self.recurrence = recurrence
        self.metadata = metadata
        self.pages = pages
        self.memory = cells.new_zeros(metadata.wave.width, recurrence.m, cells.shape[2])

    def before(self, group: Group, rows: Rows, cells: Tensor) -> None:
        if group.first_layer > 0:
            return
        if (entry := self.metadata.entries.get(group.last_position)) is not None:
            self.memory[entry.empty] = self.recurrence.initial.to(self.memory.dtype)
            if entry.resumed.numel():
                assert self.pages is not None
                stored = self.pages[self.recurrence.top].state["memory"]
                self.memory[entry.resumed] = stored[entry.pages].to(self.memory.dtype)
        memory = self.memory[: len(cells)]
        cells[:, : self.recurrence.m] += memory
        cells[:, -self.recurrence.m :] += memory

    def after(self, group: Group, cells: Tensor) -> None:
        if group.first_layer < self.recurrence.top:
            return
        self.memory[: len(cells)] = self.recurrence.norm(cells[:, -self.recurrence.m :].contiguous())
        if (retained := self.metadata.snapshots.get(group.last_position)) is not None:
            assert self.pages is not None
            target = self.pages[self.recurrence.top].state["memory"]
            target[retained.pages] = self.memory[retained.lanes].to(target.dtype)
