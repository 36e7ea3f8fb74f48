"""RMS norms of all L decoder layers in one parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import vllm._custom_ops  # noqa: F401  (makes torch.ops._C known)
from torch import Tensor, nn

from vllm_armt.diagonal.rows import Rows

CPU_VECTOR = 8
"""vLLM's CPU kernels take widths that are multiples of this."""


class StackedRMSNorm(nn.Module):
    """`x / rms(x) * w` with w `[L, size]`, applied to the rows of several layers at once."""

    def __init__(self, num_layers: int, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_layers, size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, size] -> [R, size]`."""
        if not self._has_kernel(x):
            return self._native(x, rows)
        # the kernel takes rows that lie one behind another
        x = x.contiguous()
        y = torch.empty_like(x)
        for x_l, y_l, w in zip(rows.by_layer(x), rows.by_layer(y), self.weight[rows.layers], strict=True):
            torch.ops._C.rms_norm(y_l, x_l, w, self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor, rows: Rows) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum; `x` is not to be used afterwards."""
        if not self._has_kernel(x):
            return self._native(residual.add_(x), rows)
        parts = zip(rows.by_layer(x), rows.by_layer(residual), self.weight[rows.layers], strict=True)
        for x_l, residual_l, w in parts:
            torch.ops._C.fused_add_rms_norm(x_l, residual_l, w, self.eps)
        return x

    def _has_kernel(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and x.shape[-1] % CPU_VECTOR == 0

    def _native(self, x: Tensor, rows: Rows) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        weight = self.weight[rows.layers]
        if rows.is_uniform:
            rows.stacked(y).mul_(weight.unsqueeze(1))
        else:
            for y_l, w in zip(rows.by_layer(y), weight, strict=True):
                y_l *= w
        return y
