"""What a GEMM backend does: a linear method of vLLM's over the rows of several layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_armt.linear.rows import Rows
from vllm_armt.linear.weight import Part, StackedWeight


class HasWeight(Protocol):
    """A layer as a backend sees it."""

    weight: StackedWeight


class Gemm(QuantizeMethodBase):
    """A backend: `y = x W^T + b`, each row with the weight of its own layer.

    A layer holds it as `quant_method`. By that name vLLM finds it, and calls `process_weights_after_loading(layer)`
    between loading and the first `apply`.

    Attributes:
        name: of the backend.
        weight_class: of the weights that it multiplies with.
    """

    name: ClassVar[str]
    weight_class: ClassVar[type[StackedWeight]] = StackedWeight

    @staticmethod
    @abstractmethod
    def why_not(device: torch.device, dtype: torch.dtype, in_features: int) -> str:
        """Why it can't be used; empty if it can.

        Args:
            device: of weights and rows.
            dtype: of weights and rows.
            in_features: of this rank.
        """

    def create_weights(
        self, layer: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype, parts: dict[str, Part], in_shards: int
    ) -> None:
        """Give a layer its parameter `weight`, zeros of a shape `[L, out, in]` on this rank; see `StackedWeight`."""
        layer.weight = self.weight_class(torch.zeros(shape, dtype=dtype), parts, in_shards)

    @abstractmethod
    def apply(self, layer: HasWeight, x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        """Multiply rows with their layers' weights.

        Args:
            layer: whose weights were created by `create_weights`.
            x: `[R, in]`, in the dtype of the weights.
            rows: which rows belong to which layers.
            bias: `[layers, out]`, of the rows' layers.

        Returns:
            `[R, out]`.
        """


def add_bias(y: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """Add each layer's bias to its rows, in place; `y` is `[R, out]` and `bias` `[layers, out]`."""
    if bias is not None:
        for y_l, b_l in zip(rows.by_layer(y), bias, strict=True):
            y_l += b_l
    return y
