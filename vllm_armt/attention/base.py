"""What a backend of attention does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from vllm_armt.attention.window import Past
from vllm_armt.core import SegmentLayout, Window
from vllm_armt.core.pages import LayerPages
from vllm_armt.plan.tails import TailRows

M = TypeVar("M")
"""What a backend knows of a step's tails."""


@dataclass(frozen=True)
class AttentionShape:
    """What a backend has to attend.

    Attributes:
        dtype: of queries, keys and values.
        heads, kv_heads: on this tensor-parallel rank; kv_heads divides heads.
        head_dim: of a head, on which the scale of scores depends: `head_dim ** -0.5`.
        layout: the rows of a segment.
        columns: keys of a page.
        window: how a segment sees the one before; None if it does not.
        reach: rows of its segment that a row sees, up to and with itself; None for all before it. Not with a window.
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    layout: SegmentLayout
    columns: int
    window: Window | None = None
    reach: int | None = None

    @property
    def beyond_causal(self) -> str:
        """What a kernel cannot attend whose only masks are causal; empty if it can attend all."""
        if self.window is not None:
            return "a window into the segment before"
        return "memory tokens that see one another" if self.layout.full_suffix else ""


class Attention(Protocol[M]):
    """A backend for layers of one shape, whose metadata of a step's tails is an M.

    All scores are scaled by `head_dim ** -0.5`. "Causally" is as far back as the shape's `reach`.

    Attributes:
        name: among the options.
    """

    name: ClassVar[str]

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        """Attention within each cell, as its layout says, and to the keys of the segment before if there is a window.

        Args:
            q: `[R, heads, head_dim]`, the rows of all cells, `cell_rows` each.
            k, v: `[R, kv_heads, head_dim]`.
            cell_rows: T.
            past: of the cells, with a window.

        Returns:
            `[R, heads * head_dim]`.
        """
        ...

    def build_metadata(self, rows: TailRows) -> M:
        """What `attend_tails` needs to know of a step's tails, on the device; made once a step."""
        ...

    def attend_tails(self, metadata: M, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of tails to the earlier keys of their segments and, as the layout says, to themselves.

        Keys and values of segments that stay open are left in their pages, and those that a window needs.

        Args:
            metadata: of the step.
            pages: of this layer; None where pages do not exist yet and no tail has a past.
            q: `[rows, heads, head_dim]`.
            k, v: `[rows, kv_heads, head_dim]`.

        Returns:
            `[rows, heads * head_dim]`.
        """
        ...
