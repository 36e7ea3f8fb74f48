"""Tensors of all L layers in one parameter: their parts, their tensor-parallel cuts, how a part is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size


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


class StackedWeight(nn.Parameter):
    """This rank's weights `[L, out, in]` of L linear layers, or a vector a layer (biases) `[L, out]`.

    Along `out` lie the parts, each cut by its shards.

    Args:
        data: the tensor.
        parts: by name, in their order along `out`.
        in_shards: in how many pieces tensor parallelism cuts input features, one a rank; 1 if it does not.
    """

    def __new__(cls, data: Tensor, parts: dict[str, Part], in_shards: int = 1) -> StackedWeight:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, parts: dict[str, Part], in_shards: int = 1) -> None:
        self.parts = parts
        self.begins = dict(zip(parts, accumulate((p.local_size for p in parts.values()), initial=0), strict=False))
        self.in_shards = in_shards
        self.in_features = tuple(n * in_shards for n in data.shape[2:])
        self.rank = get_tensor_model_parallel_rank()
        self.world_size = get_tensor_model_parallel_world_size()

    def shape_of(self, part: str) -> tuple[int, ...]:
        """The shape of a checkpoint's tensor for a part, before sharding: `[out, in]` or `[out]`."""
        return self.parts[part].size, *self.in_features

    def load(self, part: str, layer: int, tensor: Tensor) -> None:
        """Copy this rank's piece of a checkpoint's tensor, of shape `shape_of(part)`, into its place."""
        if self.in_shards > 1:
            tensor = tensor.chunk(self.in_shards, dim=1)[self.rank]
        shards, begin = self.parts[part].shards, self.begins[part]
        # where there are fewer pieces than ranks, neighbours hold the same
        local = tensor.chunk(shards)[self.rank // (self.world_size // shards)]
        self.loadable(layer)[begin : begin + len(local)].copy_(local)

    def loadable(self, layer: int) -> Tensor:
        """One layer's tensor, to copy into: `[out, in]` or `[out]` of this rank."""
        return self.data[layer]
