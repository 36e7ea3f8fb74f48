"""GPT-Neo as grouped decoder layers. Its learned positions are added before the first layer, by the model."""

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


class GPTNeoLayers(DecoderLayers):
    """L GPT-Neo decoder layers (HF `GPTNeoBlock`); the local ones reach over a segment, or the config is refused."""

    @staticmethod
    def architecture(config: PretrainedConfig) -> Architecture:
        d, heads = config.hidden_size, config.num_attention_heads
        return Architecture(
            layers=config.num_hidden_layers,
            hidden=d,
            heads=heads,
            kv_heads=heads,
            head_dim=d // heads,
            mlp=4 * d if config.intermediate_size is None else config.intermediate_size,
            norm=partial(StackedLayerNorm, eps=config.layer_norm_epsilon),
            act=activation(config, "activation_function"),
            qkv=("q_proj", "k_proj", "v_proj"),
            attention_out="out_proj",
            mlp_in=("c_fc",),
            mlp_out="c_proj",
            qkv_bias=False,
        )

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype=dtype)

    def weight_targets(self) -> dict[str, WeightTarget]:
        return (
            WeightTarget.of_linear("attn.attention", self.qkv)
            | WeightTarget.of_linear("attn.attention", self.attention_out)
            | WeightTarget.of_linear("mlp", self.mlp_in)
            | WeightTarget.of_linear("mlp", self.mlp_out)
            | WeightTarget.of_norm("ln_1", self.attention_norm)
            | WeightTarget.of_norm("ln_2", self.mlp_norm)
        )

    def encode(self, q: Tensor, k: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
        # its scores are not scaled, those of every backend of attention are
        return q.mul_(self.head_dim**0.5), k
