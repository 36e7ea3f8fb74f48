"""Attention inside segments: whole cells, and rows of open segments whose earlier keys lie in pages.

Cells of a group have equal length and see only themselves, so one call serves all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_cells(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each cell.

    Args:
        q: `[cells, T, heads, head_dim]`.
        k, v: `[cells, T, kv_heads, head_dim]`; kv_heads divides heads.

    Returns:
        `[cells, T, heads * head_dim]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).flatten(2)


def past_mask(past: Tensor, past_width: int, width: int) -> Tensor:
    """Which columns the rows of open segments see: their own past, then themselves causally.

    Args:
        past: `[pieces]`, tokens of each segment that lie in its page.
        past_width: columns of page keys, at least `past.max()`.
        width: rows of a piece.

    Returns:
        bool `[pieces, width, past_width + width]`.
    """
    columns = torch.arange(past_width, device=past.device)
    seen_past = (columns < past.unsqueeze(1)).unsqueeze(1).expand(-1, width, -1)
    own = torch.ones(width, width, dtype=torch.bool, device=past.device).tril()
    return torch.cat([seen_past, own.expand(past.shape[0], -1, -1)], dim=2)


def attend_past(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of a few rows over many keys under a mask.

    The query heads that share a key head become rows of one product, so keys are not repeated.

    Args:
        q: `[pieces, width, heads, head_dim]`.
        k, v: `[pieces, columns, kv_heads, head_dim]`.
        mask: bool `[pieces, width, columns]`.

    Returns:
        `[pieces, width, heads * head_dim]`.
    """
    pieces, width, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    share = heads // kv_heads
    q = q.unflatten(2, (kv_heads, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    mask = mask.repeat_interleave(share, dim=1).unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.unflatten(2, (width, share)).permute(0, 2, 1, 3, 4).reshape(pieces, width, heads * head_dim)
