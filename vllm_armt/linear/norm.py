"""Norms of all L decoder layers in one parameter, applied to the rows of several layers at once."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import vllm._custom_ops  # noqa: F401  (makes torch.ops._C known)
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from vllm_armt.linear.rows import Rows
from vllm_armt.linear.weight import Part, StackedWeight

CPU_VECTOR = 8
"""vLLM's CPU kernels take widths that are multiples of this."""


class StackedRMSNorm(nn.Module):
    """`x / rms(x) * w` with w `[L, size]`."""

    def __init__(self, num_layers: int, size: int, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_layers, size, dtype=dtype), requires_grad=False)

    def scale(self, layers: int | slice) -> Tensor:
        """w of a layer `[size]`, or of several `[layers, size]`."""
        return self.weight[layers]

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, size] -> [R, size]`."""
        if not self._has_kernel(x, rows):
            return self._native(x, rows)
        # the kernel takes rows that lie one behind another
        x = x.contiguous()
        y = torch.empty_like(x)
        for layer, (x_l, y_l) in enumerate(zip(rows.by_layer(x), rows.by_layer(y), strict=True), rows.first_layer):
            torch.ops._C.rms_norm(y_l, x_l, self.scale(layer), self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor, rows: Rows) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum; `x` is not to be used afterwards."""
        if not self._has_kernel(x, rows):
            return self._native(residual.add_(x), rows)
        by_layer = zip(rows.by_layer(x), rows.by_layer(residual), strict=True)
        for layer, (x_l, residual_l) in enumerate(by_layer, rows.first_layer):
            torch.ops._C.fused_add_rms_norm(x_l, residual_l, self.scale(layer), self.eps)
        return x

    def _has_kernel(self, x: Tensor, rows: Rows) -> bool:
        if x.dtype != self.weight.dtype:
            return False
        if x.device.type == "cuda":
            # torch's norm over the rows of several layers at once takes fewer launches
            return len(rows.counts) == 1
        return x.device.type == "cpu" and x.shape[-1] % CPU_VECTOR == 0 and _kernels_round(x.dtype)

    def _native(self, x: Tensor, rows: Rows) -> Tensor:
        """In the dtype of w, which may be wider than that of x."""
        y = F.rms_norm(x.to(self.weight.dtype), x.shape[-1:], eps=self.eps)
        return multiply(y, self.scale(rows.layers), rows).to(x.dtype)


@cache
def _kernels_round(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernels round to a type what they compute.

    Without AVX-512's instructions for bfloat16 they cut it off, which more than doubles the error of a whole model.
    """
    ones = torch.ones(1, CPU_VECTOR, dtype=dtype)
    y = torch.empty_like(ones)
    # the norm of ones is a little less than one
    torch.ops._C.rms_norm(y, ones, ones[0], 1e-6)
    return torch.allclose(y, ones, rtol=0, atol=1e-5)


class StackedCutRMSNorm(nn.Module):
    """`x / rms(x) * w` with w `[L, size]`, of rows that tensor parallelism cuts: the mean is over all ranks' columns.

    Args:
        num_layers: L.
        name: of the checkpoint's norm.
        part: how its columns are cut.
        dtype: of w.
        eps: added to the mean square.

    Attributes:
        weight: of this rank.
    """

    def __init__(self, num_layers: int, name: str, part: Part, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = StackedWeight(torch.ones(num_layers, part.local_size, dtype=dtype), {name: part})
        # neighbours hold copies where there are fewer pieces than ranks
        self.columns = part.local_size * self.weight.world_size

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, local size] -> [R, local size]`, computed in float32."""
        y = x.float()
        squares = y.square().sum(-1, keepdim=True)
        if self.weight.world_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        y = y * torch.rsqrt(squares / self.columns + self.eps)
        return multiply(y, self.weight[rows.layers], rows).to(x.dtype)


def multiply(y: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """Multiply rows `[R, size]` with their layers' `scale` `[layers, size]`, in place."""
    if rows.is_uniform:
        rows.stacked(y).mul_(scale.unsqueeze(1))
    else:
        for y_l, w in zip(rows.by_layer(y), scale, strict=True):
            y_l *= w
    return y


class StackedLayerNorm(nn.Module):
    """`(x - mean(x)) / std(x) * w + b` with w and b `[L, size]`."""

    def __init__(self, num_layers: int, size: int, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_layers, size, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_layers, size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, size] -> [R, size]`."""
        weight, bias, size = self.weight[rows.layers], self.bias[rows.layers], x.shape[-1:]
        if len(rows.counts) == 1:
            return F.layer_norm(x, size, weight[0], bias[0], self.eps)
        if rows.is_uniform and _should_batch(x):
            y = rows.stacked(F.layer_norm(x, size, eps=self.eps))
            return torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1)).flatten(0, 1)
        y = torch.empty_like(x)
        for x_l, y_l, w, b in zip(rows.by_layer(x), rows.by_layer(y), weight, bias, strict=True):
            y_l.copy_(F.layer_norm(x_l, size, w, b, self.eps))
        return y

    def add(self, x: Tensor, residual: Tensor, rows: Rows) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum."""
        return self(residual.add_(x), rows)


def _should_batch(x: Tensor) -> bool:
    """Whether one call for all layers is faster than one a layer; on CPUs a layer's rows stay in the cache."""
    return x.device.type != "cpu"
