"""Attention of cells by xformers' memory-efficient kernels: one call, whatever the cells' lengths."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.sdpa import SDPAttention
from vllm_armt.attention.window import Past


def why_no_kernel(device: torch.device, shape: AttentionShape) -> str:
    """Why xformers cannot attend such cells; empty if it can.

    It can be installed without kernels that load: a build for one CUDA does not beside a torch for another.
    """
    from xformers.ops.fmha import ALL_FW_OPS, Inputs
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    x = torch.empty(1, shape.layout.rows, 1, shape.head_dim, dtype=shape.dtype, device=device)
    inputs = Inputs(x, x, x, BlockDiagonalCausalMask.from_seqlens([shape.layout.rows], device=device))
    reasons = [op.not_supported_reasons(inputs) for op in ALL_FW_OPS]
    return f"none of its kernels can attend these cells ({'; '.join(reasons[0])})" if all(reasons) else ""


class XformersAttention(SDPAttention):
    """The backend `xformers`: cells as blocks of a block-diagonal causal mask; tails as `sdpa`."""

    name: ClassVar[str] = "xformers"

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        super().__init__(device, shape)
        self._masks: dict[int, Any] = {}

    @staticmethod
    def why_not(device: torch.device, shape: AttentionShape) -> str:
        """Why it can't be used; empty if it can."""
        if device.type != "cuda":
            return f"its kernels run on CUDA, not on {device.type}"
        if shape.beyond_causal:
            return f"the mask that it is used with is causal, without {shape.beyond_causal}"
        if shape.reach is not None:
            return "the mask that it is used with has no layers that see a part of their segment only"
        if not find_spec("xformers"):
            return "xformers is not installed (pip install xformers)"
        return why_no_kernel(device, shape)

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        count = q.shape[0] // cell_rows
        if count not in self._masks:
            self._masks[count] = BlockDiagonalCausalMask.from_seqlens([cell_rows] * count, device=q.device)
        mask = self._masks[count]
        heads, kv_heads = q.shape[1], k.shape[1]
        if heads == kv_heads:
            o = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
        else:
            # grouped queries: [1, R, kv_heads, heads / kv_heads, head_dim], keys expanded without a copy
            share = heads // kv_heads
            k, v = (x[None, :, :, None].expand(-1, -1, -1, share, -1) for x in (k, v))
            o = memory_efficient_attention(q[None].unflatten(2, (kv_heads, share)), k, v, attn_bias=mask)
        return o.reshape(q.shape[0], -1)
