"""Attention within several sequences, and a page pool of one layer to attend over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_armt.attention.naive import attend, causal
from vllm_armt.core.pages import LayerPages, PageLayout


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], reach: int | None = None) -> Tensor:
    """Causal attention within each of several sequences that lie one behind another, of so many rows."""
    split = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend(q_i, k_i, v_i, causal(len(q_i), reach=reach)) for q_i, k_i, v_i in split])


def poisoned_layer(pages: int, layout: PageLayout, device: torch.device | None = None) -> LayerPages:
    """Pages full of NaN of the middle one of three layers that lie side by side."""
    pool = torch.full((pages, 3, layout.page_bytes), -1, dtype=torch.int8, device=device)
    return LayerPages(layout, pool[:, 1])
