"""Attention by the FlashAttention kernels of vLLM's CUDA build (vllm/v1/attention/backends/flash_attn.py).

One call over all cells of a diagonal; tails read keys and values where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backends import fa_utils

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.paged import Paged
from vllm_armt.attention.window import Past
from vllm_armt.core.pages import LayerPages
from vllm_armt.plan.tails import TailRows

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = range(8, 257, 8)


@dataclass(frozen=True)
class Bounded:
    """Sequences, none of which has more than `width` rows."""

    paged: Paged
    width: int


class FlashAttention:
    """The backend `flash_attn`."""

    name: ClassVar[str] = "flash_attn"

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        self.device = device
        self.columns = shape.columns
        self.version = fa_utils.get_flash_attn_version(head_size=shape.head_dim, kv_cache_block_size=shape.columns)
        # vLLM's kernel that stores keys can also quantise them; it does not here
        self._scale = torch.ones(1, device=device)
        # keys before a row's own, and behind it
        self._seen = None if shape.reach is None else [shape.reach - 1, 0]
        self._starts: dict[tuple[int, int], Tensor] = {}

    @staticmethod
    def why_not(device: torch.device, shape: AttentionShape) -> str:
        """Why it can't be used; empty if it can."""
        if device.type != "cuda":
            return f"its kernels run on CUDA, not on {device.type}"
        if shape.beyond_causal:
            return f"its masks are causal, without {shape.beyond_causal}"
        if shape.dtype not in DTYPES:
            return f"it takes {' and '.join(map(str, DTYPES))}, not {shape.dtype}"
        if shape.head_dim not in HEAD_DIMS:
            return f"it takes heads of 8, 16 and so on up to {HEAD_DIMS[-1]}, not of {shape.head_dim}"
        version = fa_utils.get_flash_attn_version(head_size=shape.head_dim, kv_cache_block_size=shape.columns)
        return "" if version else "vLLM has none of its kernels for this device"

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        shape = q.shape[0] // cell_rows, cell_rows
        if shape not in self._starts:
            ends = torch.arange(shape[0] + 1, dtype=torch.int32, device=self.device)
            self._starts[shape] = ends * cell_rows
        return self._attend_own(self._starts[shape], cell_rows, q, k, v)

    def build_metadata(self, rows: TailRows) -> Bounded:
        return Bounded(Paged.of(rows, self.columns), width=int(rows.widths.max()))

    def attend_tails(self, metadata: Bounded, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = metadata.paged
        if pages is None:
            return self._attend_own(paged.starts, metadata.width, q, k, v)
        if paged.cleared is not None:
            # masked values are multiplied by zero, and what lies in a used page may be read as NaN
            pages.v.index_fill_(0, paged.cleared.long(), 0)
        # vLLM's layout, [pages, columns, kv_heads, head_dim], by strides
        k_pages, v_pages = pages.k.transpose(1, 2), pages.v.transpose(1, 2)
        fa_utils.reshape_and_cache_flash(k, v, k_pages, v_pages, paged.slots, "auto", self._scale, self._scale)
        o: Tensor = fa_utils.flash_attn_varlen_func(
            q,
            k_pages,
            v_pages,
            max_seqlen_q=metadata.width,
            cu_seqlens_q=paged.starts,
            # whatever the lengths are, so that steps are alike
            max_seqlen_k=paged.table.shape[1] * self.columns,
            seqused_k=paged.lengths,
            block_table=paged.table,
            causal=True,
            window_size=self._seen,
            fa_version=self.version,
        )
        return o.flatten(1)

    def _attend_own(self, starts: Tensor, width: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequences that see nothing but themselves; they start at `starts` `[sequences + 1]`."""
        o: Tensor = fa_utils.flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=width,
            cu_seqlens_q=starts,
            max_seqlen_k=width,
            cu_seqlens_k=starts,
            causal=True,
            window_size=self._seen,
            fa_version=self.version,
        )
        return o.flatten(1)
