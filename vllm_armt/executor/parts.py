"""What the executors run: decoder layers, what flows between segments, and the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vllm_armt.attention import LayerAttention
from vllm_armt.attention.window import Move
from vllm_armt.core import SegmentLayout, Window
from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.rows import Rows
from vllm_armt.recurrence import Recurrence


class GroupedLayers(Protocol):
    """A backbone's L decoder layers, cut at attention so that the executors decide who sees whom.

    A layer is `complete(h, attend(project(h)))` over the rows of one or several layers.
    """

    num_layers: int

    def project(self, h: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, position-encoded where positions are rotary.

        Args:
            h: `[R, d]`.
            rows: the layers of its rows.
            positions: int64 `[R]`.

        Returns:
            q `[R, heads, head_dim]`; k and v `[R, kv_heads, head_dim]`.
        """
        ...

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        """Turn inputs h `[R, d]` into outputs in place, from attended values o `[R, heads * head_dim]`."""
        ...


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that run between embedding and final norm.

    Attributes:
        layers: the decoder layers.
        recurrence: what flows from segment to segment.
        attention: of all layers.
        layout: the rows of a segment.
        positions: learned position embeddings, int64 `[*] -> [*, d]`; None without.
        window: how segments see the keys of the one before; None if they don't.
        pages: per layer; None while vLLM has not allocated them (memory profiling).
        move: what moves the keys of a closed segment to where a window has them; None where they stay.
    """

    layers: GroupedLayers
    recurrence: Recurrence[Any]
    attention: LayerAttention
    layout: SegmentLayout
    positions: Callable[[Tensor], Tensor] | None
    window: Window | None
    pages: Sequence[LayerPages] | None
    move: Move | None = None
