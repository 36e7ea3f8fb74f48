"""Pre-norm decoder layers with stacked weights: what all backbones have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from vllm_armt.linear.norm import StackedLayerNorm, StackedRMSNorm
from vllm_armt.linear.rows import Rows
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.linear.weight import Part
from vllm_armt.models.backbones.rotary import MovedBack, StackedRotary
from vllm_armt.models.weights import WeightTarget

StackedNorm = StackedLayerNorm | StackedRMSNorm


@dataclass(frozen=True)
class Architecture:
    """What a decoder layer is made of, before tensor parallelism cuts it.

    Attributes:
        layers, hidden: L and d.
        heads, kv_heads, head_dim: of attention.
        mlp: features between the MLP's two linear layers.
        norm: makes the norm of all layers from L, a width and a dtype.
        act: the function between the MLP's linear layers.
        qkv, attention_out, mlp_in, mlp_out: names of the linear layers, `mlp_in` being one or two.
        qkv_bias, attention_out_bias, mlp_bias: which of them have biases.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm: Callable[[int, int, torch.dtype], StackedNorm]
    act: Callable[[Tensor], Tensor]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    qkv: tuple[str, str, str] = ("q", "k", "v")
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True


class DecoderLayers(nn.Module):
    """L layers `h += out(attend(qkv(norm(h)))); h += mlp(norm(h))` with stacked weights; a `GroupedLayers`.

    A backbone states its architecture, where its checkpoint's tensors go, and what it does differently.

    Args:
        config: the base model's configuration.
        num_positions: positions that can occur in a segment; a query and a key are less than this apart.
        dtype: of weights and activations.

    Raises:
        ValueError: the configuration asks for something that is not supported.
    """

    def __init__(self, config: PretrainedConfig, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        parts = self.architecture(config)
        L, d, heads, kv_heads, mlp = parts.layers, parts.hidden, parts.heads, parts.kv_heads, parts.mlp
        tp = get_tensor_model_parallel_world_size()
        if heads % tp or mlp % tp or (kv_heads % tp and tp % kv_heads):
            raise ValueError(
                f"{heads} attention heads, {kv_heads} key-value heads and {mlp} MLP features "
                f"can't be split over tensor_parallel_size={tp}."
            )
        self.num_layers = L
        self.head_dim = parts.head_dim
        self.heads, self.kv_heads = heads // tp, max(1, kv_heads // tp)
        self.attention_norm, self.mlp_norm = (parts.norm(L, d, dtype) for _ in range(2))
        q, kv = Part(heads * self.head_dim, tp), Part(kv_heads * self.head_dim, min(tp, kv_heads))
        self.qkv = StackedLinear(L, d, dict(zip(parts.qkv, (q, kv, kv), strict=True)), parts.qkv_bias, dtype)
        self.attention_out = StackedLinear(
            L, q.size, {parts.attention_out: Part(d)}, parts.attention_out_bias, dtype, shard="input"
        )
        self.mlp_in = StackedLinear(L, d, dict.fromkeys(parts.mlp_in, Part(mlp, tp)), parts.mlp_bias, dtype)
        self.act = parts.act
        self.mlp_out = StackedLinear(L, mlp, {parts.mlp_out: Part(d)}, parts.mlp_bias, dtype, shard="input")
        ropes = self.rope_parameters(config)
        self.rotary = StackedRotary(config, ropes, self.head_dim, num_positions, dtype) if any(ropes) else None

    @staticmethod
    def architecture(config: PretrainedConfig) -> Architecture:
        """What a decoder layer of the base model is made of.

        Raises:
            ValueError: the configuration asks for something that is not supported.
        """
        raise NotImplementedError

    @staticmethod
    def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any] | None]:
        """Per layer, its rotary positions, as transformers spells them; None if it has none."""
        return [getattr(config, "rope_parameters", None)] * config.num_hidden_layers

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        """The norm behind the last layer, `[R, d] -> [R, d]`; its parameters have the checkpoint's names."""
        raise NotImplementedError

    def weight_targets(self) -> dict[str, WeightTarget]:
        """Where a decoder layer's tensors go, by their names in the checkpoint."""
        raise NotImplementedError

    def embed(self, embeddings: Tensor) -> Tensor:
        """What enters the first layer for tokens of such embeddings `[R, d]`; memory tokens enter as they are."""
        return embeddings

    def project(self, h: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `GroupedLayers`."""
        qkv = self.qkv(self.enter(h, rows), rows)
        q, k, v = qkv.split(self.qkv.local_sizes, dim=-1)
        q, k = self.encode(q, k, rows, positions)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # type: ignore[return-value]

    def enter(self, h: Tensor, rows: Rows) -> Tensor:
        """What queries, keys and values are projected from, `[R, d] -> [R, d]`."""
        return self.attention_norm(h, rows)

    def encode(self, q: Tensor, k: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare queries `[R, heads * head_dim]` and keys for attention; learned positions are in h already."""
        return (q, k) if self.rotary is None else self.rotary(positions, q, k, rows)

    def moving_back(self, distance: int) -> Callable[[Tensor], Tensor]:
        """What turns keys `[*, kv_heads, head_dim]` into those of positions that are smaller by `distance`.

        Raises:
            ValueError: the keys of this base model can't be moved, or not so far.
        """
        if self.rotary is None or any(self.rotary.offsets):
            raise ValueError(
                "A window whose keys lie as far back as they are (`window_positions` 'grow') needs rotary positions "
                "that are alike in all layers, which this base model has not."
            )
        return MovedBack(self.rotary.rope, distance)

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        """See `GroupedLayers`."""
        x = self.mlp_norm.add(self.attention_out(o, rows), h, rows)
        h += self.mlp(x, rows)

    def mlp(self, x: Tensor, rows: Rows) -> Tensor:
        """The MLP of normed rows, `[R, d] -> [R, d]`."""
        return self.mlp_out(self.act(self.mlp_in(x, rows)), rows)


def only(config: PretrainedConfig, **allowed: bool) -> None:
    """Refuse switches of a base model's configuration that stand otherwise than what is computed.

    Raises:
        ValueError: one does.
    """
    for field, value in allowed.items():
        given = getattr(config, field)
        if bool(given) != value:
            raise ValueError(f"`{field}` of the base model is {given!r}; only {value!r} is supported.")
