"""The Llama family as grouped decoder layers: Llama, Mistral, Qwen2 (biases) and Qwen3 (q/k norms)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_armt.linear.norm import StackedRMSNorm
from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones.activation import GatedActivation
from vllm_armt.models.backbones.decoder import Architecture, DecoderLayers
from vllm_armt.models.weights import WeightTarget


class LlamaLayers(DecoderLayers):
    """L Llama decoder layers (HF `LlamaDecoderLayer`)."""

    def __init__(self, config: PretrainedConfig, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_positions, dtype)
        self.q_norm, self.k_norm = (
            StackedRMSNorm(self.num_layers, self.head_dim, dtype, config.rms_norm_eps)
            if config.model_type == "qwen3"
            else None
            for _ in range(2)
        )

    @staticmethod
    def architecture(config: PretrainedConfig, act: str = "hidden_act") -> Architecture:
        d, heads = config.hidden_size, config.num_attention_heads
        return Architecture(
            layers=config.num_hidden_layers,
            hidden=d,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or d // heads,
            mlp=config.intermediate_size,
            norm=partial(StackedRMSNorm, eps=config.rms_norm_eps),
            act=GatedActivation(config, act),
            qkv=("q_proj", "k_proj", "v_proj"),
            attention_out="o_proj",
            mlp_in=("gate_proj", "up_proj"),
            mlp_out="down_proj",
            qkv_bias=getattr(config, "attention_bias", config.model_type == "qwen2"),
            attention_out_bias=getattr(config, "attention_bias", False),
            mlp_bias=getattr(config, "mlp_bias", False),
        )

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def weight_targets(self) -> dict[str, WeightTarget]:
        targets = (
            WeightTarget.of_linear("self_attn", self.qkv)
            | WeightTarget.of_linear("self_attn", self.attention_out)
            | WeightTarget.of_linear("mlp", self.mlp_in)
            | WeightTarget.of_linear("mlp", self.mlp_out)
            | WeightTarget.of_norm("input_layernorm", self.attention_norm)
            | WeightTarget.of_norm("post_attention_layernorm", self.mlp_norm)
        )
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            targets |= WeightTarget.of_norm(f"self_attn.{name}", norm) if norm is not None else {}
        return targets

    def encode(self, q: Tensor, k: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm_heads(self.q_norm, q, rows), self._norm_heads(self.k_norm, k, rows)
        return super().encode(q, k, rows, positions)

    def _norm_heads(self, norm: StackedRMSNorm, x: Tensor, rows: Rows) -> Tensor:
        """RMS norm of every head of `[R, heads * head_dim]`, the weight being shared by a layer's heads."""
        heads = x.shape[-1] // self.head_dim
        per_head = Rows(rows.first_layer, tuple(count * heads for count in rows.counts))
        return norm(x.reshape(-1, self.head_dim), per_head).view(x.shape)
