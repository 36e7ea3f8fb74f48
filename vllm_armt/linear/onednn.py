"""GEMMs by oneDNN on CPUs: each layer's weight is packed once, as those of vLLM's own linear layers are.

The rows of several layers are a loop over packed weights: measured, no batched product is faster on CPUs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, cast

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform

from vllm_armt.linear.base import Gemm, HasWeight
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.weight import StackedWeight

logger = init_logger(f"vllm.{__name__}")

PRIMITIVES = 128
"""Row counts for which oneDNN keeps a compiled product per weight."""


@cache
def onednn_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which oneDNN multiplies rows of a dtype on this CPU, None where it does not.

    vLLM packs its linear layers by the same rule (`dispatch_cpu_unquantized_gemm`,
    vllm/model_executor/layers/utils.py). Which types oneDNN knows depends on the CPU, so it is asked: x86-64
    without AVX-512 has no bfloat16. vLLM leaves such layers to torch; with many rows, and a text is read in
    many, that takes ten times as long as a product in float32.
    """
    if not ops._supports_onednn or current_platform.get_cpu_architecture() == CpuArchEnum.POWERPC:
        return None
    for candidate in (dtype, torch.promote_types(dtype, torch.float32)):
        try:
            ops.create_onednn_mm(torch.zeros(32, 32, dtype=candidate).t(), PRIMITIVES)
        except RuntimeError:
            continue
        if candidate != dtype:
            logger.warning(
                "This CPU cannot multiply matrices of %s: products are computed in %s, in which weights are retained.",
                dtype,
                candidate,
            )
        return candidate
    return None


class PackedWeight(StackedWeight):
    """A stacked weight that oneDNN packs layer by layer; the packed copies are the weights from then on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        dtype = onednn_dtype(self.dtype)
        assert dtype is not None
        self.gemm_dtype = dtype
        self.out_features = self.shape[1]
        self.packed: list[ops.CPUDNNLGEMMHandler] = []
        self._unpacked: dict[int, Tensor] = {}

    def loadable(self, layer: int) -> Tensor:
        """One layer's weight `[out, in]`, to copy into; a packed one is unpacked until it is packed again."""
        if not self.packed:
            return super().loadable(layer)
        if layer not in self._unpacked:
            self._unpacked[layer] = self._unpack(self.packed[layer])
        return self._unpacked[layer]

    def pack(self) -> None:
        """Pack the weights of all layers, or of those that were loaded since."""
        if self.packed:
            for layer in list(self._unpacked):
                self.packed[layer] = self._pack(self._unpacked.pop(layer))
        else:
            self.packed = [self._pack(weight) for weight in self.data]
            self.data = self.new_empty(0)

    def _pack(self, weight: Tensor) -> ops.CPUDNNLGEMMHandler:
        return ops.create_onednn_mm(weight.to(self.gemm_dtype).t(), PRIMITIVES)

    def _unpack(self, handler: ops.CPUDNNLGEMMHandler) -> Tensor:
        # oneDNN has no way back, but rows of the identity multiply to the very weights, finite ones to the bit
        rows = torch.eye(handler.k, dtype=self.gemm_dtype)
        transposed = rows.new_empty(handler.k, handler.n)
        torch.ops._C.onednn_mm(transposed, rows, None, handler.handler_tensor)
        return transposed.t().to(self.dtype).contiguous()


class OneDNNGemm(Gemm):
    """The backend `onednn`."""

    name: ClassVar[str] = "onednn"
    weight_class: ClassVar[type[StackedWeight]] = PackedWeight

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, in_features: int) -> str:
        if device.type != "cpu":
            return f"vLLM's oneDNN products run on CPUs, not on {device.type}"
        return "" if onednn_dtype(dtype) else f"vLLM's oneDNN has no products of {dtype} on this CPU"

    def process_weights_after_loading(self, layer: HasWeight) -> None:
        cast(PackedWeight, layer.weight).pack()

    def apply(self, layer: HasWeight, x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        weight = cast(PackedWeight, layer.weight)
        dtype, packed = weight.gemm_dtype, weight.packed[rows.layers]
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y = x.new_empty(x.shape[0], weight.out_features)
        multiply = torch.ops._C.onednn_mm
        for i, (x_l, y_l) in enumerate(zip(rows.by_layer(x), rows.by_layer(y), strict=True)):
            multiply(y_l, x_l, None if bias is None else bias[i], packed[i].handler_tensor)
        return y.to(weight.dtype)
