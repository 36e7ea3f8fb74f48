"""The memory projections of all layers, stacked: queries of rows, and keys, values and beta of memory tokens.

A layer without a memory keeps its projections at zero: phi(0) = 0, so it reads zeros and writes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_armt.core.memory import MemoryRule
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.linear.weight import Part


class MemoryProjections(nn.Module):
    """W_mq, W_mk, W_mv and W_mb of L layers, replicated on every tensor-parallel rank.

    What is written is float32: features, values and beta. Queries are in the dtype of the model, in which
    rows are multiplied with everything else too.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, d_mem: int, beta_size: int, rule: MemoryRule, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rule = rule
        self.feature_size = rule.feature_size(d_mem)
        self.sizes = (d_mem, hidden_size, beta_size)
        self.read_projection = StackedLinear(num_layers, hidden_size, {"W_mq": Part(d_mem)}, False, dtype)
        write_parts = {"W_mk": Part(d_mem), "W_mv": Part(hidden_size), "W_mb": Part(beta_size)}
        self.write_projection = StackedLinear(num_layers, hidden_size, write_parts, True, dtype)

    def queries(self, h: Tensor, rows: Rows) -> Tensor:
        """q = phi(W_mq h): `[R, d] -> [R, K]`, in the dtype of h."""
        return self.rule.phi(self.query_inputs(h, rows))

    def query_inputs(self, h: Tensor, rows: Rows) -> Tensor:
        """u = W_mq h: `[R, d] -> [R, p]`, in the dtype of h."""
        return self.read_projection(h.to(self.read_projection.dtype), rows).to(h.dtype)

    def writes(self, o: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """k = phi(W_mk o), v = W_mv o and beta = sigmoid(W_mb o + b) of memory-token outputs.

        Args:
            o: `[R, d]`.
            rows: their layers.

        Returns:
            k `[R, K]`, v `[R, d]`, beta `[R, h]`, or with gating `[R, d]`.
        """
        projected = self.write_projection(o.to(self.write_projection.dtype), rows).float()
        k, v, beta = projected.split(self.sizes, dim=-1)
        return self.rule.phi(k), v, torch.sigmoid(beta)
