"""Attention of all L layers, of which some may see less of their segment than others (Gemma 3, GPT-Neo)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from vllm_armt.attention.base import Attention, AttentionShape
from vllm_armt.attention.choose import BACKENDS, choose_attention
from vllm_armt.attention.window import Past
from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.tails import TailRows


class LayerAttention:
    """One backend, once for each reach that layers have.

    In a group of several layers neighbours of one reach are one call: a Gemma 3 of 26 layers has nine such runs.

    Attributes:
        backends: of each reach.
        kinds: per layer, which of them is its own.
    """

    def __init__(self, backends: Sequence[Attention[Any]], kinds: Sequence[int]) -> None:
        self.backends = backends
        self.kinds = kinds

    @property
    def name(self) -> str:
        """Of the backend."""
        return self.backends[0].name

    @classmethod
    def choose(cls, name: str, device: torch.device, shape: AttentionShape, reaches: Sequence[int | None]) -> Self:
        """By the name of a backend, or "auto", for layers of a shape that have these reaches.

        Raises:
            ValueError: the named backend cannot run here.
        """
        distinct = sorted(set(reaches), key=lambda reach: (reach is None, reach))
        # one that can do with a reach can do without
        backend = choose_attention(name, device, replace(shape, reach=distinct[0]))
        others = [BACKENDS[backend.name](device, replace(shape, reach=reach)) for reach in distinct[1:]]
        return cls([backend, *others], [distinct.index(reach) for reach in reaches])

    def attend_cells(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cell_rows: int, past: Past | None = None
    ) -> Tensor:
        """See `Attention`; `rows` are the layers of the cells."""
        if len(self.backends) == 1:
            return self.backends[0].attend_cells(q, k, v, cell_rows, past)
        assert past is None, "configurations refuse layers of several reaches that see the segment before"
        outputs = [
            self.backends[kind].attend_cells(q[run], k[run], v[run], cell_rows) for kind, run in self._runs(rows)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def build_metadata(self, rows: TailRows) -> list[Any]:
        """What `attend_tails` needs to know of a step's tails, on the device; made once a step."""
        return [backend.build_metadata(rows) for backend in self.backends]

    def attend_tails(
        self, metadata: list[Any], layer: int, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """See `Attention`; `layer` is that of all rows."""
        kind = self.kinds[layer]
        return self.backends[kind].attend_tails(metadata[kind], pages, q, k, v)

    def _runs(self, rows: Rows) -> Iterator[tuple[int, slice]]:
        """Which backend attends which rows, for each run of layers of one reach."""
        begin = 0
        for kind, run in groupby(zip(self.kinds[rows.layers], rows.counts, strict=True), key=lambda layer: layer[0]):
            end = begin + sum(count for _, count in run)
            yield kind, slice(begin, end)
            begin = end
