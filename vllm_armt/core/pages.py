"""Pages: the bytes of one (segment, layer) in vLLM's pool, and typed views of them.

A page holds the keys and values of a segment while it is open, and the state after it once it is closed.
The two share the page's first bytes: in a layer's forward the keys are read before the state is written,
and never again. Only a window, through which the next segment sees the keys, keeps them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Pages start at multiples of this many bytes, so that every view is aligned for its dtype."""

COLUMN_ALIGNMENT = 32
"""Keys of a page are padded to multiples of this many, as vLLM's kernels want their blocks."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor of what flows from segment to segment, at one layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """Sizes that decide a page's bytes.

    Attributes:
        segment_size: S, the tokens of a block of vLLM's.
        rows: T, rows of a segment that have keys: its tokens and the memory tokens around them.
        kv_heads, head_dim, kv_dtype: of the keys and values on this tensor-parallel rank.
        state: what a closed segment leaves, by name; not sharded.
        keys_stay: whether the keys of a closed segment are still read.
    """

    segment_size: int
    rows: int
    kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    state: Mapping[str, StateTensor]
    keys_stay: bool = False

    @property
    def columns(self) -> int:
        """Keys that a page has room for."""
        return -(-self.rows // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT

    @property
    def kv_bytes(self) -> int:
        """Bytes of an open segment's keys and values at one layer."""
        return 2 * self.columns * self.kv_heads * self.head_dim * self.kv_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of what a closed segment leaves at one layer."""
        return sum(tensor.bytes for tensor in self.state.values())

    @property
    def state_offset(self) -> int:
        """Where the state begins in the page."""
        return -(-self.kv_bytes // ALIGNMENT) * ALIGNMENT if self.keys_stay else 0

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, aligned, and whole rows of matrices by head (M), so that the pool is rows of them too."""
        rows = [tensor.shape[-1] * tensor.dtype.itemsize for tensor in self.state.values() if len(tensor.shape) > 2]
        unit = math.lcm(ALIGNMENT, *rows)
        return -(-max(self.kv_bytes, self.state_offset + self.state_bytes) // unit) * unit


class LayerPages:
    """Typed views of one layer's pages; indexing them by page id reads and writes vLLM's pool.

    Attributes:
        k, v: `[pages, kv_heads, columns, head_dim]`, in the layout's kv dtype; how a head's keys lie within
            its `[columns, head_dim]` is the attention backend's.
        state: by name, `[pages, *shape]`.
    """

    def __init__(self, layout: PageLayout, pool: Tensor) -> None:
        """Make the views.

        Args:
            layout: what a page consists of.
            pool: int8 `[pages, page_bytes]`, contiguous in its last dimension only.
        """
        if pool.shape[1] != layout.page_bytes:
            raise ValueError(f"The pool's pages have {pool.shape[1]} bytes; the layout needs {layout.page_bytes}.")
        half = layout.kv_bytes // 2
        kv_shape = (layout.kv_heads, layout.columns, layout.head_dim)
        self.k = pool[:, :half].view(layout.kv_dtype).unflatten(1, kv_shape)
        self.v = pool[:, half : 2 * half].view(layout.kv_dtype).unflatten(1, kv_shape)
        self.state: dict[str, Tensor] = {}
        begin = layout.state_offset
        for name, tensor in layout.state.items():
            view = pool[:, begin : begin + tensor.bytes].view(tensor.dtype)
            self.state[name] = view.unflatten(1, tensor.shape)
            begin += tensor.bytes
