"""Rotary positions of a base model, as vLLM computes them."""

from __future__ import annotations

import torch
from torch import Tensor
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


class MovedBack:
    """Keys as they would be at smaller positions: all turned by one angle a pair of channels.

    Args:
        rotary: what has rotated the keys.
        distance: how much smaller.

    Raises:
        ValueError: so large a distance, or this way to pair channels, is not supported.
    """

    def __init__(self, rotary: RotaryEmbeddingBase, distance: int) -> None:
        if distance >= len(rotary.cos_sin_cache) or not rotary.is_neox_style:
            raise ValueError(
                f"The keys of the segment before lie {distance} positions further back, which these rotary positions "
                f"({len(rotary.cos_sin_cache)}) don't allow. Use a smaller `segment_size`."
            )
        turn = rotary.cos_sin_cache[distance].float()
        # scaled in some kinds, as the keys are already
        self.cos, self.sin = torch.nn.functional.normalize(turn.view(2, -1), dim=0)

    def __call__(self, k: Tensor) -> Tensor:
        """`[*, kv_heads, head_dim]`, in the dtype of `k`."""
        half = len(self.cos)
        first, second, rest = k.float().split([half, half, k.shape[-1] - 2 * half], dim=-1)
        turned = [first * self.cos + second * self.sin, second * self.cos - first * self.sin, rest]
        return torch.cat(turned, dim=-1).to(k.dtype)
