"""Single rows read memories by torch's `embedding_bag`: M is read where it lies, as a weighted sum of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.core.memory import MemoryRule
from vllm_armt.recurrence.armt_reads import Reads

BAGS = 6
"""Parts in which a single row reads a head of M, so that one request occupies several threads; K/h is a multiple."""


@dataclass(frozen=True)
class Bags:
    """Rows of a pool that are summed, each with its weight.

    Attributes:
        rows: int64 `[bags * rows of a bag]`.
        starts: int64 `[bags]`, where each bag begins.
    """

    rows: Tensor
    starts: Tensor

    @classmethod
    def of(cls, pages: Tensor, M: Tensor) -> Bags:
        """Where the rows of the memories M of some pages `[n]` lie: `n * h * BAGS` bags of `K/h / BAGS`."""
        _, heads, K, _ = M.shape
        rows = pages.unsqueeze(1) * _pool_rows(M)[1] + torch.arange(heads * K, device=pages.device)
        return cls(rows.flatten(), torch.arange(0, rows.numel(), K // BAGS, device=pages.device))


def add_reads(rule: MemoryRule, reads: Reads, bags: Bags, u: Tensor, state: Mapping[str, Tensor], h: Tensor) -> None:
    """Add to single rows what they find in the memories before their segments.

    Args:
        rule: of the memory.
        reads: of width 1.
        bags: of their pages; the same at every layer.
        u: `W_mq h`, `[local rows, p]`.
        state: of a layer's pages, with `M` `[pages, h, K/h, d/h]` and `z` `[pages, h, K/h]`.
        h: `[local rows, d]`, changed in place.
    """
    z = state["z"].index_select(0, reads.pages).float()
    weights = rule.weights(rule.split_heads(rule.phi(reads.gather(u))).float(), z)
    rows, _ = _pool_rows(state["M"])
    # torch.nn.functional's would count the starts anew at every layer
    parts, *_ = torch.embedding_bag(rows, bags.rows, bags.starts, per_sample_weights=weights.flatten().to(rows.dtype))
    A = parts.view(-1, rule.heads, BAGS, rows.shape[1]).sum(2, dtype=torch.float32)
    reads.add(h, A.flatten(1).unsqueeze(1).to(h.dtype))


def _pool_rows(M: Tensor) -> tuple[Tensor, int]:
    """The pool as rows of its memories M `[pages, h, K/h, d/h]`: `[*, d/h]`, and the rows from a page to the next."""
    pages, heads, K, d = M.shape
    stride = M.stride(0) // d
    return M.as_strided(((pages - 1) * stride + heads * K, d), (d, 1)), stride
