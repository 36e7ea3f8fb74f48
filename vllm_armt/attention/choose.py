"""Which backend of attention is chosen."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger

from vllm_armt.attention.base import Attention, AttentionShape
from vllm_armt.attention.flash_attn import FlashAttention
from vllm_armt.attention.sdpa import SDPAttention
from vllm_armt.attention.vllm_cpu import VllmCPUAttention
from vllm_armt.attention.xformers import XformersAttention

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")

Backend = type[VllmCPUAttention] | type[FlashAttention] | type[XformersAttention] | type[SDPAttention]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (VllmCPUAttention, FlashAttention, XformersAttention, SDPAttention)
}
"""By name, the fastest first; the last one can always be used."""


def choose_attention(name: str, device: torch.device, shape: AttentionShape) -> Attention[Any]:
    """The backend of that name; "auto" is the fastest that the device and the shape allow.

    Raises:
        ValueError: the named backend cannot run here.
    """
    reasons = {key: backend.why_not(device, shape) for key, backend in BACKENDS.items()}
    chosen = next(key for key, why_not in reasons.items() if not why_not) if name == "auto" else name
    if reasons[chosen]:
        usable = ", ".join(repr(key) for key in ("auto", *BACKENDS) if not reasons.get(key))
        raise ValueError(
            f'additional_config["armt"]["attention"] is {name!r}, which can\'t be used here: {reasons[chosen]}. '
            f"Usable here: {usable}."
        )
    refused = "; ".join(f"{key}: {reason}" for key, reason in reasons.items() if reason)
    logger.info("Attention: %s%s.", chosen, f" ({refused})" if refused else "")
    return BACKENDS[chosen](device, shape)
