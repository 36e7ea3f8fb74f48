"""Gemma 3 as grouped decoder layers: Gemma's, with four norms a layer, q/k norms, and rotary positions of two bases.

Five of six layers are local: they see a sliding window of their segment (`RecurrentConfig.reaches`), and their rotary
positions have a base of their own. Memory tokens stand at a segment's end at positions that follow its tokens, and the
authors' code hands such a segment to transformers' layers as any other. So the window is counted over all its rows: in
local layers a memory token sees the last tokens and memory tokens before it, in global ones the whole segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones.decoder import Architecture, only
from vllm_armt.models.backbones.gemma import GemmaLayers, StackedGemmaNorm
from vllm_armt.models.weights import WeightTarget


class Gemma3Layers(GemmaLayers):
    """L Gemma 3 decoder layers (HF `Gemma3DecoderLayer`)."""

    def __init__(self, config: PretrainedConfig, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_positions, dtype)
        L, d, eps = self.num_layers, config.hidden_size, config.rms_norm_eps
        # attention scales scores by head_dim ** -0.5 instead
        factor = (self.head_dim / config.query_pre_attn_scalar) ** 0.5
        self.q_norm = StackedGemmaNorm(L, self.head_dim, dtype, eps, factor)
        self.k_norm = StackedGemmaNorm(L, self.head_dim, dtype, eps)
        self.attention_out_norm, self.mlp_out_norm = (StackedGemmaNorm(L, d, dtype, eps) for _ in range(2))

    @staticmethod
    def architecture(config: PretrainedConfig, act: str = "hidden_activation") -> Architecture:
        only(config, attn_logit_softcapping=False)
        return GemmaLayers.architecture(config, act)

    @staticmethod
    def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any] | None]:
        return [config.rope_parameters[kind] for kind in config.layer_types]

    def weight_targets(self) -> dict[str, WeightTarget]:
        return super().weight_targets() | (
            WeightTarget.of_norm("post_attention_layernorm", self.attention_out_norm)
            | WeightTarget.of_norm("pre_feedforward_layernorm", self.mlp_norm)
            | WeightTarget.of_norm("post_feedforward_layernorm", self.mlp_out_norm)
        )

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        x = self.mlp_norm.add(self.attention_out_norm(self.attention_out(o, rows), rows), h, rows)
        h += self.mlp_out_norm(self.mlp(x, rows), rows)
