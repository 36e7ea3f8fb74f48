"""Which GEMM backend multiplies on a device, and in which dtype."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from vllm_armt.linear.base import Gemm
from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.grouped import GroupedGemm
from vllm_armt.linear.onednn import OneDNNGemm, onednn_dtype

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")

BACKENDS: tuple[type[Gemm], ...] = (OneDNNGemm, GroupedGemm, BatchedGemm)
"""The fastest first; the last runs everywhere."""


def choose_gemm(device: torch.device, dtype: torch.dtype, in_features: int) -> Gemm:
    """The fastest backend for weights of a dtype on a device; `in_features` is this rank's."""
    reasons = {backend: backend.why_not(device, dtype, in_features) for backend in BACKENDS}
    chosen = next(backend for backend, why_not in reasons.items() if not why_not)
    refused = "; ".join(f"{backend.name}: {reason}" for backend, reason in reasons.items() if reason)
    logger.info_once("GEMM of %s: %s%s.", dtype, chosen.name, f" ({refused})" if refused else "")
    return chosen()


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies rows of a dtype: their own, or float32 on a CPU without products of it."""
    return (onednn_dtype(dtype) or dtype) if device.type == "cpu" else dtype
