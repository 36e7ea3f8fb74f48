"""Linear layers of all L decoder layers in one parameter, so that a group of layers is one product.

A uniform group multiplies a slice `[l0:l1]`; the sequential order is the slice of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)


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
    """`y = x W^T + b` with W `[L, out, in]`, applied to a slice of layers at once.

    `parts` (several layers of a checkpoint side by side) are cut by output features. With
    `shard="input"` W is cut by input features instead and the ranks' results are summed.
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
        out = sum(part.local_size for part in parts.values())
        self.weight = nn.Parameter(torch.empty(num_layers, out, local_in, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_layers, out, dtype=dtype), requires_grad=False) if bias else None

    @property
    def local_sizes(self) -> list[int]:
        """Output features of each part on this rank."""
        return [part.local_size for part in self.parts.values()]

    def shape_of(self, part: str, kind: str) -> tuple[int, ...]:
        """The shape that a checkpoint's tensor for a part must have; `kind` is "weight" or "bias"."""
        size = self.parts[part].size
        return (size, self.in_features) if kind == "weight" else (size,)

    def load(self, part: str, kind: str, layer: int, tensor: Tensor) -> None:
        """Copy a checkpoint's full weight or bias of one part into its place."""
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

    def forward(self, x: Tensor, layers: slice) -> Tensor:
        """`[n, rows, in] -> [n, rows, out]` for the n layers of the slice."""
        weight = self.weight[layers]
        bias = None if self.bias is None else self.bias[layers]
        if self.shard_input and self.world_size > 1:
            y = tensor_model_parallel_all_reduce(_linear(x, weight, None))
            return y if bias is None else y + bias.unsqueeze(1)
        return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        return F.linear(x[0], weight[0], None if bias is None else bias[0]).unsqueeze(0)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
