"""Rotary positions of a base model, as vLLM computes them."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
"""Values of `rope_type` for which vLLM computes what transformers does."""


def rotary(config: PretrainedConfig, head_dim: int, num_positions: int, dtype: torch.dtype) -> RotaryEmbeddingBase:
    """A module that turns `positions, q, k` into rotated q and k, in place where it has a kernel.

    Args:
        config: the base model's, with `rope_parameters`.
        num_positions: that can occur.

    Raises:
        ValueError: positions of this kind, or so many of them, are not supported.
    """
    kind, limit = config.rope_parameters["rope_type"], config.max_position_embeddings
    if kind not in KINDS:
        raise ValueError(
            f"`rope_type` of the base model is {kind!r}; supported: {', '.join(repr(known) for known in KINDS)}."
        )
    made = get_rope(
        head_dim,
        # beyond the base model's own positions "dynamic" depends on the length of the text
        max_position=limit if kind == "dynamic" else max(limit, num_positions),
        rope_parameters=config.rope_parameters,
        dtype=dtype,
    )
    if len(made.cos_sin_cache) < num_positions:
        raise ValueError(
            f"{num_positions} positions can occur, but with `rope_type` {kind!r} the base model has "
            f"{len(made.cos_sin_cache)}. Use a smaller `segment_size`."
        )
    return made
