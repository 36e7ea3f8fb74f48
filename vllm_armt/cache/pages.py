"""Pages: the bytes of one (segment, layer) in vLLM's pool, and typed views of them.

A page holds the keys and values of a segment while it is open, and the memory after it once it is
closed. The two share the page's first bytes: in a layer's forward the keys are read before the
memory is written, and never again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Pages start at multiples of this many bytes, so that every view is aligned for its dtype."""

COLUMN_ALIGNMENT = 32
"""Keys of a page are padded to multiples of this many, as vLLM's kernels want their blocks."""


@dataclass(frozen=True)
class PageLayout:
    """Sizes that decide a page's bytes.

    Attributes:
        segment_size: S.
        num_mem_tokens: m. Keys of the memory tokens lie behind those of the segment while it is closed.
        kv_heads, head_dim, kv_dtype: of the keys and values on this tensor-parallel rank.
        feature_size, hidden_size: K and d; the memory is not sharded.
        state_dtype: of M and z in the page.
    """

    segment_size: int
    num_mem_tokens: int
    kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    feature_size: int
    hidden_size: int
    state_dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Keys that a page has room for."""
        return -(-(self.segment_size + self.num_mem_tokens) // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT

    @property
    def kv_bytes(self) -> int:
        """Bytes of an open segment's keys and values at one layer."""
        return 2 * self.columns * self.kv_heads * self.head_dim * self.kv_dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """Bytes of M and z at one layer."""
        return (self.hidden_size + 1) * self.feature_size * self.state_dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the larger of the two uses, aligned, and whole rows of M (see `LayerPages.rows`)."""
        unit = math.lcm(ALIGNMENT, self.hidden_size * self.state_dtype.itemsize)
        return -(-max(self.kv_bytes, self.memory_bytes) // unit) * unit


class LayerPages:
    """Typed views of one layer's pages; indexing them by page id reads and writes vLLM's pool.

    Attributes:
        M: `[pages, K, d]` and z: `[pages, K]`, in the layout's state dtype.
        k, v: `[pages, kv_heads, columns, head_dim]`, in the layout's kv dtype; how a head's keys lie within
            its `[columns, head_dim]` is the attention backend's.
        rows: `[*, d]`, the pool as rows of M: row i of page p's M is row `p * page_rows + i`.
        page_rows: rows from one page to the next.
    """

    def __init__(self, layout: PageLayout, pool: Tensor) -> None:
        """Make the views.

        Args:
            layout: what a page consists of.
            pool: int8 `[pages, page_bytes]`, contiguous in its last dimension only.
        """
        if pool.shape[1] != layout.page_bytes:
            raise ValueError(f"The pool's pages have {pool.shape[1]} bytes; the layout needs {layout.page_bytes}.")
        K, d = layout.feature_size, layout.hidden_size
        state_itemsize = layout.state_dtype.itemsize
        half = layout.kv_bytes // 2
        kv_shape = (layout.kv_heads, layout.columns, layout.head_dim)
        self.M = pool[:, : K * d * state_itemsize].view(layout.state_dtype).unflatten(1, (K, d))
        self.page_rows = self.M.stride(0) // d
        self.rows = self.M.as_strided(((len(pool) - 1) * self.page_rows + K, d), (d, 1))
        self.z = pool[:, K * d * state_itemsize : layout.memory_bytes].view(layout.state_dtype)
        self.k = pool[:, :half].view(layout.kv_dtype).unflatten(1, kv_shape)
        self.v = pool[:, half : 2 * half].view(layout.kv_dtype).unflatten(1, kv_shape)
