"""Attention written out, and a page pool of one layer to attend over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_armt.core.pages import LayerPages, PageLayout


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in float64, head by head.

    Args:
        q: `[rows, heads, head_dim]`.
        k, v: `[columns, kv_heads, head_dim]`.
        seen: bool `[rows, columns]`.

    Returns:
        `[rows, heads * head_dim]`.
    """
    share = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[2])
        outputs.append(scores.masked_fill(~seen.to(scores.device), -math.inf).softmax(-1) @ v[:, head // share])
    return torch.cat(outputs, dim=1)


def causal(rows: int, past: int = 0) -> Tensor:
    """Rows that see `past` columns, those before them and themselves: bool `[rows, past + rows]`."""
    return torch.ones(rows, past + rows, dtype=torch.bool).tril(past)


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention within each of several sequences that lie one behind another, of so many rows."""
    split = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend(q_i, k_i, v_i, causal(len(q_i))) for q_i, k_i, v_i in split])


def poisoned_layer(pages: int, layout: PageLayout, device: torch.device | None = None) -> LayerPages:
    """Pages full of NaN of the middle one of three layers that lie side by side."""
    pool = torch.full((pages, 3, layout.page_bytes), -1, dtype=torch.int8, device=device)
    return LayerPages(layout, pool[:, 1])
