"""Linear layers of all L decoder layers in one, so that the rows of several layers are one call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_armt.linear.base import add_bias
from vllm_armt.linear.choose import choose_gemm
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.weight import Part, StackedWeight


class StackedLinear(nn.Module):
    """`y = x W^T + b` with W `[L, out, in]`, applied to the rows of several layers at once.

    `parts` (several layers of a checkpoint side by side) are cut by output features. With
    `shard="input"` W is cut by input features instead and the ranks' results are summed, once a call.

    Attributes:
        weight, bias: `[L, out, in]` and `[L, out]` of this rank, or no bias.
        quant_method: the GEMM backend, under the name by which vLLM finds it.
        local_sizes: output features of each part on this rank.
    """

    weight: StackedWeight

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
        in_shards = get_tensor_model_parallel_world_size() if shard == "input" else 1
        self.reduce_results = in_shards > 1
        self.local_sizes = [part.local_size for part in parts.values()]
        shape = (num_layers, sum(self.local_sizes), in_features // in_shards)
        self.quant_method = choose_gemm(torch.get_default_device(), dtype, shape[2])
        self.quant_method.create_weights(self, shape, dtype, parts, in_shards)
        self.bias = StackedWeight(torch.zeros(shape[:2], dtype=dtype), parts) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def weights(self) -> dict[str, StackedWeight]:
        """What a checkpoint has of each part, "weight" and, with biases, "bias", and where it is loaded."""
        return dict(self.named_parameters())  # type: ignore[arg-type]

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[R, in] -> [R, out]`, each row with its own layer's weight."""
        bias = None if self.bias is None else self.bias[rows.layers]
        if self.reduce_results:
            y = tensor_model_parallel_all_reduce(self.quant_method.apply(self, x, rows, None))
            return add_bias(y, bias, rows)
        return self.quant_method.apply(self, x, rows, bias)
