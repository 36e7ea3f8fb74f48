"""Linear layers of all L decoder layers in one parameter, so that a group of layers is one product.

A uniform group is a batched product of a slice `[l0:l1]`, a ragged one a grouped product; the sequential
order is the slice of one layer. On CPUs each layer's weight is packed for oneDNN once, as vLLM's own linear
layers are, and a group is a loop over packed products: measured, no batched product is faster there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
import vllm._custom_ops as ops
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vllm_armt.linear.onednn import PRIMITIVES, onednn_dtype
from vllm_armt.linear.rows import Rows


@dataclass(frozen=True)
class Part:
    """A checkpoint's linear layer that occupies some output rows of a stacked one.

    Attributes:
        size: its output features before sharding.
        shards: in how many distinct pieces tensor parallelism cuts it; ranks beyond hold copies
            (grouped-query keys with fewer heads than ranks). 1 for a replicated part.
    """

    size: int
    shards: int = 1

    @property
    def local_size(self) -> int:
        return self.size // self.shards

    def local(self, weight: Tensor, rank: int, world_size: int) -> Tensor:
        """This rank's rows of a full weight or bias."""
        shard = rank // (world_size // self.shards)
        return weight.narrow(0, shard * self.local_size, self.local_size)


class StackedLinear(nn.Module):
    """`y = x W^T + b` with W `[L, out, in]`, applied to the rows of several layers at once.

    `parts` (several layers of a checkpoint side by side) are cut by output features. With
    `shard="input"` W is cut by input features instead and the ranks' results are summed, once a call.
    """

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        parts: dict[str, Part],
        bias: bool,
        dtype: torch.dtype,
        shard: Literal["output", "input"] = "output",
    ) -> None:
        super().__init__()
        self.parts = parts
        self.rank = get_tensor_model_parallel_rank()
        self.world_size = get_tensor_model_parallel_world_size()
        self.shard_input = shard == "input"
        self.in_features = in_features
        local_in = in_features // self.world_size if self.shard_input else in_features
        self.out_features = sum(part.local_size for part in parts.values())
        self._shape = (num_layers, self.out_features, local_in)
        self.weight = nn.Parameter(torch.zeros(self._shape, dtype=dtype), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.zeros(num_layers, self.out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self._packed: list[ops.CPUDNNLGEMMHandler] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def local_sizes(self) -> list[int]:
        """Output features of each part on this rank."""
        return [part.local_size for part in self.parts.values()]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a checkpoint has of each part."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def shape_of(self, part: str, kind: str) -> tuple[int, ...]:
        """The shape that a checkpoint's tensor for a part must have; `kind` is "weight" or "bias"."""
        size = self.parts[part].size
        return (size, self.in_features) if kind == "weight" else (size,)

    def load(self, part: str, kind: str, layer: int, tensor: Tensor) -> None:
        """Copy a checkpoint's full weight or bias of one part into its place."""
        if self._packed:
            # weights come again, all of them
            self._packed = []
            self.weight.data = torch.zeros(self._shape, dtype=self.dtype)
        target = self.weight if kind == "weight" else self.bias
        assert target is not None
        if kind == "weight" and self.shard_input:
            width = self.weight.shape[2]
            tensor = tensor.narrow(1, self.rank * width, width)
        begin = 0
        for name, other in self.parts.items():
            if name == part:
                break
            begin += other.local_size
        local = self.parts[part].local(tensor, self.rank, self.world_size)
        target.data[layer, begin : begin + local.shape[0]].copy_(local)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, in] -> [R, out]`, each row with its own layer's weight."""
        bias = None if self.bias is None else self.bias[rows.layers]
        if self.shard_input and self.world_size > 1:
            return _add_bias(tensor_model_parallel_all_reduce(self._product(x, None, rows)), bias, rows)
        return self._product(x, bias, rows)

    def _product(self, x: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        if x.device.type == "cpu" and (packed := onednn_dtype(self.dtype)) is not None:
            return self._packed_product(x, bias, rows, packed)
        return grouped_product(x, self.weight[rows.layers], bias, rows)

    def _packed_product(self, x: Tensor, bias: Tensor | None, rows: Rows, dtype: torch.dtype) -> Tensor:
        if not self._packed:
            self._packed = [ops.create_onednn_mm(weight.to(dtype).t(), PRIMITIVES) for weight in self.weight]
            # the packed copies are the weights from now on
            self.weight.data = self.weight.new_empty(0)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y = x.new_empty(x.shape[0], self.out_features)
        multiply = torch.ops._C.onednn_mm
        handlers = self._packed[rows.layers]
        for i, (x_l, y_l) in enumerate(zip(rows.by_layer(x), rows.by_layer(y), strict=True)):
            multiply(y_l, x_l, None if bias is None else bias[i], handlers[i].handler_tensor)
        return y.to(self.dtype)


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """The product without packed weights.

    Args:
        x: `[R, in]`.
        weight: `[layers, out, in]` and bias `[layers, out]`, of the rows' layers.
        rows: one batched product if uniform; one grouped product if ragged and the device has it, else a
            batched one for every run of layers with equally many rows.

    Returns:
        `[R, out]`.
    """
    if len(rows.counts) == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    if rows.is_uniform:
        y = torch.bmm(rows.stacked(x), weight.transpose(1, 2))
        return (y if bias is None else y.add_(bias.unsqueeze(1))).flatten(0, 1)
    if rows.ends is not None and _can_group(x):
        return _add_bias(F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends), bias, rows)
    outputs, begin = [], 0
    for _, same in groupby(rows.counts):
        run = Rows(begin, tuple(same))
        x_run, x = x.split([sum(run.counts), len(x) - sum(run.counts)])
        outputs.append(grouped_product(x_run, weight[run.layers], None if bias is None else bias[run.layers], run))
        begin += len(run.counts)
    return torch.cat(outputs)


def _can_group(x: Tensor) -> bool:
    """What torch's grouped product takes without waiting for the device (its operands are aligned to 16 bytes)."""
    return x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0


def _add_bias(y: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """Add each layer's bias to its rows, in place."""
    if bias is not None:
        for y_l, b_l in zip(rows.by_layer(y), bias, strict=True):
            y_l += b_l
    return y
