"""GEMMs by torch's products, with a grouped one where layers have unequally many rows."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.platforms import current_platform

from vllm_armt.linear.base import add_bias
from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.rows import Rows

ALIGNMENT = 8
"""Features of bfloat16 in the 16 bytes to which `grouped_mm` wants its operands aligned."""


def has_grouped_mm(device: torch.device) -> bool:
    """Whether torch's `grouped_mm` runs on a device without waiting for it.

    Below compute capability 9.0 it reads its offsets on the host.
    """
    return device.type == "cuda" and current_platform.is_cuda() and current_platform.has_device_capability(90)


class GroupedGemm(BatchedGemm):
    """The backend `grouped`; ragged rows must say where each layer's end."""

    name: ClassVar[str] = "grouped"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, in_features: int) -> str:
        if device.type != "cuda":
            return f"torch's grouped_mm runs on CUDA, not on {device.type}"
        if not has_grouped_mm(device):
            return "torch's grouped_mm waits for the device below compute capability 9.0"
        if dtype != torch.bfloat16:
            return f"torch's grouped_mm takes bfloat16, not {dtype}"
        if in_features % ALIGNMENT:
            return f"torch's grouped_mm takes multiples of {ALIGNMENT} input features, not {in_features}"
        return ""

    def multiply_ragged(self, x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        assert rows.ends is not None
        return add_bias(F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends), bias, rows)
