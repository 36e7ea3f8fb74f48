"""GPT-2 as grouped decoder layers. Its learned positions are added before the first layer, by the model."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vllm_armt.linear.norm import StackedLayerNorm
from vllm_armt.models.backbones.activation import activation
from vllm_armt.models.backbones.decoder import Architecture, DecoderLayers, only
from vllm_armt.models.weights import WeightTarget


class GPT2Layers(DecoderLayers):
    """L GPT-2 decoder layers (HF `GPT2Block`)."""

    @staticmethod
    def architecture(config: PretrainedConfig) -> Architecture:
        only(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        d, heads = config.hidden_size, config.num_attention_heads
        return Architecture(
            layers=config.num_hidden_layers,
            hidden=d,
            heads=heads,
            kv_heads=heads,
            head_dim=d // heads,
            mlp=4 * d if config.n_inner is None else config.n_inner,
            norm=partial(StackedLayerNorm, eps=config.layer_norm_epsilon),
            act=activation(config, "activation_function"),
            attention_out="c_proj",
            mlp_in=("c_fc",),
            mlp_out="c_proj",
        )

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype=dtype)

    def weight_targets(self) -> dict[str, WeightTarget]:
        linears = (
            WeightTarget.of_fused("attn.c_attn", self.qkv, _thirds)
            | WeightTarget.of_linear("attn", self.attention_out)
            | WeightTarget.of_linear("mlp", self.mlp_in)
            | WeightTarget.of_linear("mlp", self.mlp_out)
        )
        norms = WeightTarget.of_norm("ln_1", self.attention_norm) | WeightTarget.of_norm("ln_2", self.mlp_norm)
        return {name: target.transposed() for name, target in linears.items()} | norms


def _thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """c_attn is queries, keys and values, concatenated."""
    return tensor.chunk(3)
