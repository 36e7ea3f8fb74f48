"""Windows: attention that reaches back to the keys of the segment before (Transformer-XL, sliding-window ARMT).

The keys of memory tokens are not seen. Keys keep the positions that they had in their own segment, unless they are to
lie further back: then they are moved once, when their segment closes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.core import SegmentLayout, Window
from vllm_armt.core.pages import LayerPages
from vllm_armt.plan.step import Group
from vllm_armt.plan.upload import upload
from vllm_armt.plan.wave import WaveMetadata


def first_seen(window: Window, layout: SegmentLayout) -> list[int]:
    """By row of a segment, the first token of the segment before that it sees; S for none."""
    if window == "all":
        return [0] * layout.rows
    none = layout.tokens
    if window == "rows":
        return [none] * layout.prefix + [min(row, none) for row in range(layout.prefix, layout.rows)]
    return [none] * layout.prefix + list(range(layout.tokens)) + [0] * layout.suffix


Move = Callable[[Tensor], Tensor]
"""What turns keys `[*, kv_heads, head_dim]` into those of positions further back."""


def move_closed(move: Move, layout: SegmentLayout, pages: LayerPages, closed: Tensor) -> None:
    """Move the keys of the tokens of segments that close, in their pages `closed` `[n]`."""
    keys = pages.k[:, :, layout.prefix : layout.prefix + layout.tokens].transpose(1, 2)
    keys[closed] = move(keys[closed])


@dataclass(frozen=True)
class Past:
    """Keys and values of the segments before, for the cells of a group.

    Attributes:
        k, v: `[cells, S, kv_heads, head_dim]`.
        mask: bool `[cells, T, S]`, which of them a cell's rows see.
    """

    k: Tensor
    v: Tensor
    mask: Tensor


class WindowLanes:
    """The keys and values of a wave's last segments, one per lane and layer of a block."""

    def __init__(
        self,
        window: Window,
        layout: SegmentLayout,
        metadata: WaveMetadata,
        pages: Sequence[LayerPages] | None,
        move: Move | None = None,
    ) -> None:
        self.move = move
        self.metadata = metadata
        self.pages = pages
        self.tokens = slice(layout.prefix, layout.prefix + layout.tokens)
        self.layout = layout
        (seen,) = upload([first_seen(window, layout)], metadata.rows.device)
        self.seen = torch.arange(layout.tokens, device=seen.device) >= seen.unsqueeze(1)
        self.k = self.v = torch.empty(0)

    def past(self, group: Group, k: Tensor, v: Tensor) -> Past:
        """What the cells of a group see, whose own keys and values `[R, kv_heads, head_dim]` take its place."""
        wave = self.metadata.wave
        if self.k.numel() == 0:
            # what nothing has been written to is masked, and never read as what an empty buffer may hold
            shape = (wave.depth, wave.width, self.layout.tokens, *k.shape[1:])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        begin, end = wave.span(group)
        k, v = (x.unflatten(0, (-1, self.layout.rows))[:, self.tokens] for x in (k, v))
        if self.move is not None:
            k = self.move(k)
        pasts, first = [], 0
        for (layer, inner, q), count in zip(self.metadata.layers_of(group), group.lanes, strict=True):
            self._enter(layer, inner, q)
            pasts.append((self.k[inner, :count].clone(), self.v[inner, :count].clone()))
            self.k[inner, :count] = k[first : first + count]
            self.v[inner, :count] = v[first : first + count]
            self._keep(layer, inner, q)
            first += count
        past_k, past_v = (torch.cat(parts) for parts in zip(*pasts, strict=True))
        return Past(past_k, past_v, self.seen & ~self.metadata.first[begin:end, None, None])

    def _enter(self, layer: int, inner: int, q: int) -> None:
        """Give lanes the keys before the documents that go on at position q."""
        entry = self.metadata.entries.get(q)
        if entry is None or not entry.resumed.numel():
            return
        assert self.pages is not None
        pages = self.pages[layer]
        for lanes, keys in ((self.k, pages.k), (self.v, pages.v)):
            lanes[inner].index_copy_(0, entry.resumed, keys[entry.pages][:, :, self.tokens].transpose(1, 2))

    def _keep(self, layer: int, inner: int, q: int) -> None:
        """Leave the keys of retained segments in their pages."""
        retained = self.metadata.snapshots.get(q)
        if retained is None:
            return
        assert self.pages is not None
        pages = self.pages[layer]
        for lanes, keys in ((self.k, pages.k), (self.v, pages.v)):
            keys[:, :, self.tokens].transpose(1, 2)[retained.pages] = lanes[inner][retained.lanes]
