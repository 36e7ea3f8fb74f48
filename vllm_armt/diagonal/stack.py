"""What the executors run: decoder layers, their memories and their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.diagonal.memory import StackedMemory


class GroupedLayers(Protocol):
    """A backbone's L decoder layers, cut at attention so that the executors decide who sees whom.

    Layer l of rows h is `complete(h, attend(project(h)))`; `layers` is a slice of n layers.
    """

    num_layers: int

    def project(self, layers: slice, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, position-encoded.

        Args:
            layers: n layers.
            h: `[n, rows, d]`.
            positions: int64 `[n * rows]`, positions inside the segment.

        Returns:
            q `[n * rows, heads, head_dim]`; k and v `[n * rows, kv_heads, head_dim]`.
        """
        ...

    def complete(self, layers: slice, h: Tensor, o: Tensor) -> Tensor:
        """The layers' outputs `[n, rows, d]`, from inputs h and attended values o `[n, rows, heads * head_dim]`."""
        ...


@dataclass(frozen=True)
class Stack:
    """The parts of a model that run between embedding and final norm.

    Attributes:
        layers: the decoder layers.
        memory: their memory projections.
        memory_tokens: `[m, d]`, the same in every segment.
        pages: per layer; None while vLLM has not allocated them (memory profiling).
        segment_size: S.
    """

    layers: GroupedLayers
    memory: StackedMemory
    memory_tokens: Tensor
    pages: Sequence[LayerPages] | None
    segment_size: int


def upload(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Bring several lists of integers to the device in one copy that the host does not wait for."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64, pin_memory=device.type == "cuda")
    return list(flat.to(device, non_blocking=True).split([len(values) for values in lists]))
