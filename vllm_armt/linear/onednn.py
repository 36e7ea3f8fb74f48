"""In which type a device multiplies matrices, where that is not the type of the rows."""

from __future__ import annotations

from functools import cache

import torch
import vllm._custom_ops as ops
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform

logger = init_logger(f"vllm.{__name__}")

PRIMITIVES = 128
"""Row counts for which oneDNN keeps a compiled product per weight."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which rows of a type multiply on a device: their own, or float32 on a CPU without products of it."""
    return (onednn_dtype(dtype) or dtype) if device.type == "cpu" else dtype


@cache
def onednn_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The type in which oneDNN multiplies rows of a type on this CPU, None where nothing is packed for it.

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
