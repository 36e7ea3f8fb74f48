"""GEMMs by torch's own products, on any device: one for rows of layers that have equally many."""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_armt.linear.base import Gemm, HasWeight
from vllm_armt.linear.rows import Rows


class BatchedGemm(Gemm):
    """The backend `batched`."""

    name: ClassVar[str] = "batched"
    # as they are loaded, weights are ready
    supports_pre_processed_weights: ClassVar[bool] = True

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, in_features: int) -> str:
        return ""

    def apply(self, layer: HasWeight, x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        return self.multiply(x, layer.weight[rows.layers], rows, bias)

    def multiply(self, x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        """The product with weights `[layers, out, in]` of the rows' layers."""
        if len(rows.counts) == 1:
            return F.linear(x, weight[0], None if bias is None else bias[0])
        if rows.is_uniform:
            y = torch.bmm(rows.stacked(x), weight.transpose(1, 2))
            return (y if bias is None else y.add_(bias.unsqueeze(1))).flatten(0, 1)
        return self.multiply_ragged(x, weight, rows, bias)

    def multiply_ragged(self, x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        """The product where layers have unequally many rows: one for every run of layers that have equally many."""
        outputs, begin = [], 0
        for _, same in groupby(rows.counts):
            run = Rows(begin, tuple(same))
            x_run, x = x.split([sum(run.counts), len(x) - sum(run.counts)])
            outputs.append(self.multiply(x_run, weight[run.layers], run, None if bias is None else bias[run.layers]))
            begin += len(run.counts)
        return torch.cat(outputs)
