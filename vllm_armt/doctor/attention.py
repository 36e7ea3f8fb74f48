"""Which backends of attention run here, and why the others do not."""

from __future__ import annotations

import torch

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.choose import BACKENDS
from vllm_armt.core import SegmentLayout
from vllm_armt.doctor.findings import Finding

USUAL = AttentionShape(torch.bfloat16, 16, 16, 64, SegmentLayout(0, 1024, 128), 1152)
"""A model as there are many, where none is given."""


def attention(device: str, shape: AttentionShape = USUAL) -> Finding:
    """The backends for a shape, the one that is chosen first."""
    reasons = {name: backend.why_not(torch.device(device), shape) for name, backend in BACKENDS.items()}
    usable = ", ".join(name for name, reason in reasons.items() if not reason)
    refused = "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason)
    dtype = str(shape.dtype).removeprefix("torch.")
    return Finding("attention", "ok", f"{usable} for heads of {shape.head_dim} in {dtype}{refused}.")
