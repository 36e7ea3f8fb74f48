"""Single rows read memories by torch's `embedding_bag`: a gather-sum, which reads M where it lies, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_armt.core.memory import MemoryRule
from vllm_armt.recurrence.armt_reads import Reads

PARTS = 6
"""In which a single row reads a head of M, so that one request occupies several threads; K/h is a multiple."""


@dataclass(frozen=True)
class GatheredRows:
    """Rows of a pool that are summed, each with its weight; the same at every layer.

    Attributes:
        rows: int64 `[sums * rows of a sum]`.
        starts: int64 `[sums]`, where the rows of each sum begin.
    """

    rows: Tensor
    starts: Tensor

    @classmethod
    def of(cls, pages: Tensor, M: Tensor) -> GatheredRows:
        """Where the rows of the memories M of `pages` `[n]` lie: `n * h * PARTS` sums of `K/h / PARTS` rows."""
        _, heads, K, _ = M.shape
        rows = pages.unsqueeze(1) * _pool_rows(M)[1] + torch.arange(heads * K, device=pages.device)
        return cls(rows.flatten(), torch.arange(0, rows.numel(), K // PARTS, device=pages.device))

    def add_reads(self, rule: MemoryRule, reads: Reads, u: Tensor, state: Mapping[str, Tensor], h: Tensor) -> None:
        """Add to single rows what they find in the memories before their segments.

        Args:
            rule: of the memory.
            reads: of width 1, whose pages these are.
            u: `W_mq h`, `[rows, p]`.
            state: of a layer's pages, with `M` `[pages, h, K/h, d/h]` and `z` `[pages, h, K/h]`.
            h: `[rows, d]`, changed in place.
        """
        z = state["z"].index_select(0, reads.pages).float()
        weights = rule.weights(rule.split_heads(rule.phi(reads.gather(u))).float(), z)
        rows, _ = _pool_rows(state["M"])
        # torch.nn.functional's would count the starts anew at every layer
        parts, *_ = torch.embedding_bag(
            rows, self.rows, self.starts, per_sample_weights=weights.flatten().to(rows.dtype)
        )
        A = parts.view(-1, rule.heads, PARTS, rows.shape[1]).sum(2, dtype=torch.float32)
        reads.add(h, A.flatten(1).unsqueeze(1).to(h.dtype))


def _pool_rows(M: Tensor) -> tuple[Tensor, int]:
    """The pool as rows of its memories M `[pages, h, K/h, d/h]`: `[*, d/h]`, and the rows from a page to the next."""
    pages, heads, K, d = M.shape
    stride = M.stride(0) // d
    return M.as_strided(((pages - 1) * stride + heads * K, d), (d, 1)), stride
