"""Rotary positions of a base model, as vLLM computes them; layers may have several kinds of them, or none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.cache import LRUCache

from vllm_armt.linear.rows import Rows
from vllm_armt.plan.upload import upload

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
"""Values of `rope_type` for which vLLM computes what transformers does."""

GROUPS = 256
"""Shapes of grouped forwards, those met last, whose rows' tables are kept."""


class StackedRotary(nn.Module):
    """Rotates the rows of several layers at once, each row as its own layer does.

    The tables of all kinds, a cosine and a sine for each position, lie one behind another, so that a layer's kind is
    an offset to the positions of its rows.

    Args:
        config: the base model's.
        parameters: per layer its `rope_parameters`; None for a layer that does not rotate.
        head_dim: of queries and keys.
        num_positions: that can occur.
        dtype: of queries and keys.

    Raises:
        ValueError: positions of this kind, or so many of them, are not supported.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        parameters: Sequence[dict[str, Any] | None],
        head_dim: int,
        num_positions: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        kinds: list[dict[str, Any]] = []
        for kind in parameters:
            if kind is not None and kind not in kinds:
                kinds.append(kind)
        ropes = [_rope(config, kind, head_dim, num_positions, dtype) for kind in kinds]
        # of the base model's own positions, of which it may have many, those that can occur
        tables = [rope.cos_sin_cache[:num_positions] for rope in ropes]
        if None in parameters:
            tables.append(_identity(tables[0]))
        begins = list(accumulate(map(len, tables), initial=0))
        self.offsets = [begins[len(kinds) if kind is None else kinds.index(kind)] for kind in parameters]
        self.rope = ropes[0] if len(tables) == 1 else _with_table(ropes[0], torch.cat(tables))
        self._rows: LRUCache[tuple[int, tuple[int, ...]], Tensor] = LRUCache(GROUPS)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Rotated q `[R, heads * head_dim]` and k, in place where vLLM has a kernel; positions are int64 `[R]`."""
        q, k = self.rope(self._in_tables(positions, rows), q, k)
        return q, k

    def _in_tables(self, positions: Tensor, rows: Rows) -> Tensor:
        offsets = self.offsets[rows.layers]
        if not any(offsets):
            return positions
        if len(offsets) == 1:
            return positions + offsets[0]
        key = rows.first_layer, rows.counts
        if key not in self._rows:
            (self._rows[key],) = upload([np.repeat(offsets, rows.counts)], positions.device)
        return positions + self._rows[key]


def _rope(
    config: PretrainedConfig, parameters: dict[str, Any], head_dim: int, num_positions: int, dtype: torch.dtype
) -> RotaryEmbedding:
    """vLLM's module for positions of one kind."""
    kind, limit = parameters["rope_type"], config.max_position_embeddings
    if kind not in KINDS:
        raise ValueError(
            f"`rope_type` of the base model is {kind!r}; supported: {', '.join(repr(known) for known in KINDS)}."
        )
    made = get_rope(
        head_dim,
        # beyond the base model's own positions "dynamic" depends on the length of the text
        max_position=limit if kind == "dynamic" else max(limit, num_positions),
        rope_parameters=parameters,
        dtype=dtype,
    )
    if len(made.cos_sin_cache) < num_positions:
        raise ValueError(
            f"{num_positions} positions can occur, but with `rope_type` {kind!r} the base model has "
            f"{len(made.cos_sin_cache)}. Use a smaller `segment_size`."
        )
    return made


def _identity(table: Tensor) -> Tensor:
    """A table of the same shape that turns nothing: cosines of 1, sines of 0."""
    cos, sin = table.chunk(2, dim=-1)
    return torch.cat([torch.ones_like(cos), torch.zeros_like(sin)], dim=-1)


def _with_table(rope: RotaryEmbedding, table: Tensor) -> RotaryEmbedding:
    """A module that rotates as `rope` does, by another table; vLLM shares `rope` itself among all models."""
    # one position, as its table is replaced
    made = RotaryEmbedding(rope.head_size, rope.rotary_dim, 1, rope.base, rope.is_neox_style, table.dtype)
    made.cos_sin_cache = table
    return made


class MovedBack:
    """Keys as they would be at smaller positions: all turned by one angle a pair of channels.

    Args:
        rotary: what has rotated the keys.
        distance: how much smaller.

    Raises:
        ValueError: so large a distance, or this way to pair channels, is not supported.
    """

    def __init__(self, rotary: RotaryEmbedding, distance: int) -> None:
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
