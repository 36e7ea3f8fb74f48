"""GPT-NeoX as grouped decoder layers, with its parallel residual or without."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vllm_armt.linear.norm import StackedLayerNorm
from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones.activation import activation
from vllm_armt.models.backbones.decoder import Architecture, DecoderLayers
from vllm_armt.models.weights import WeightTarget


class GPTNeoXLayers(DecoderLayers):
    """L GPT-NeoX decoder layers (HF `GPTNeoXLayer`)."""

    def __init__(self, config: PretrainedConfig, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_positions, dtype)
        self.parallel_residual = config.use_parallel_residual

    @staticmethod
    def architecture(config: PretrainedConfig) -> Architecture:
        d, heads = config.hidden_size, config.num_attention_heads
        return Architecture(
            layers=config.num_hidden_layers,
            hidden=d,
            heads=heads,
            kv_heads=heads,
            head_dim=d // heads,
            mlp=config.intermediate_size,
            norm=partial(StackedLayerNorm, eps=config.layer_norm_eps),
            act=activation(config, "hidden_act"),
            attention_out="dense",
            mlp_in=("dense_h_to_4h",),
            mlp_out="dense_4h_to_h",
            qkv_bias=config.attention_bias,
            attention_out_bias=config.attention_bias,
        )

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def weight_targets(self) -> dict[str, WeightTarget]:
        return (
            WeightTarget.of_fused("attention.query_key_value", self.qkv, self._by_head)
            | WeightTarget.of_linear("attention", self.attention_out)
            | WeightTarget.of_linear("mlp", self.mlp_in)
            | WeightTarget.of_linear("mlp", self.mlp_out)
            | WeightTarget.of_norm("input_layernorm", self.attention_norm)
            | WeightTarget.of_norm("post_attention_layernorm", self.mlp_norm)
        )

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        if not self.parallel_residual:
            super().complete(h, o, rows)
            return
        # attention and MLP read the same h
        h += self.mlp(self.mlp_norm(h, rows), rows).add_(self.attention_out(o, rows))

    def _by_head(self, tensor: Tensor) -> list[Tensor]:
        """query_key_value holds head behind head, of each the query, the key and the value."""
        heads = tensor.unflatten(0, (-1, 3, self.head_dim))
        return [part.flatten(0, 1) for part in heads.unbind(1)]
