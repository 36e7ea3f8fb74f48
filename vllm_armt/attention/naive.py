"""Attention written out: the readable truth that every backend is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def causal(rows: int, past: int = 0, full: int = 0, reach: int | None = None) -> Tensor:
    """Rows that see `past` columns, those before them and themselves, the last `full` all: `[rows, past + rows]`.

    Args:
        reach: columns that a row sees at most, the last of them its own; None for all.
    """
    seen = torch.ones(rows, past + rows, dtype=torch.bool).tril(past)
    seen[rows - full :] = True
    return seen if reach is None else seen.triu(past - reach + 1)
