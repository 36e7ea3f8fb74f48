"""What the executors run: decoder layers, their memories and their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.diagonal.attention import Attention
from vllm_armt.diagonal.memory import StackedMemory
from vllm_armt.diagonal.rows import Rows


class GroupedLayers(Protocol):
    """A backbone's L decoder layers, cut at attention so that the executors decide who sees whom.

    A layer is `complete(h, attend(project(h)))` over the rows of one or several layers.
    """

    num_layers: int

    def project(self, h: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, position-encoded.

        Args:
            h: `[R, d]`.
            rows: the layers of its rows.
            positions: int64 `[R]`, positions inside the segment.

        Returns:
            q `[R, heads, head_dim]`; k and v `[R, kv_heads, head_dim]`.
        """
        ...

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        """Turn inputs h `[R, d]` into outputs in place, from attended values o `[R, heads * head_dim]`."""
        ...


@dataclass(frozen=True)
class Stack:
    """The parts of a model that run between embedding and final norm.

    Attributes:
        layers: the decoder layers.
        memory: their memory projections.
        attention: the backend.
        memory_tokens: `[m, d]`, the same in every segment.
        pages: per layer; None while vLLM has not allocated them (memory profiling).
        segment_size: S.
    """

    layers: GroupedLayers
    memory: StackedMemory
    attention: Attention
    memory_tokens: Tensor
    pages: Sequence[LayerPages] | None
    segment_size: int
