"""OLMo 2 as grouped decoder layers: Llama's, with norms behind attention and MLP in place of before them.

Queries and keys are normed over the width of all heads, which tensor parallelism cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vllm_armt.linear.norm import StackedCutRMSNorm
from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones.decoder import DecoderLayers
from vllm_armt.models.backbones.llama import LlamaLayers
from vllm_armt.models.weights import WeightTarget


class Olmo2Layers(LlamaLayers):
    """L OLMo 2 decoder layers (HF `Olmo2DecoderLayer`).

    `attention_norm` and `mlp_norm` are the norms of what attention and MLP give.
    """

    def __init__(self, config: PretrainedConfig, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_positions, dtype)
        q, k, _ = self.qkv.weight.parts.values()
        self.q_width_norm, self.k_width_norm = (
            StackedCutRMSNorm(self.num_layers, name, part, dtype, config.rms_norm_eps)
            for name, part in (("q_norm", q), ("k_norm", k))
        )

    def weight_targets(self) -> dict[str, WeightTarget]:
        targets = super().weight_targets()
        del targets["input_layernorm.weight"]
        return targets | (
            WeightTarget.of_norm("post_attention_layernorm", self.attention_norm)
            | WeightTarget.of_norm("post_feedforward_layernorm", self.mlp_norm)
            | WeightTarget.of_parts("self_attn", {"weight": self.q_width_norm.weight})
            | WeightTarget.of_parts("self_attn", {"weight": self.k_width_norm.weight})
        )

    def enter(self, h: Tensor, rows: Rows) -> Tensor:
        return h

    def encode(self, q: Tensor, k: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
        return DecoderLayers.encode(self, self.q_width_norm(q, rows), self.k_width_norm(k, rows), rows, positions)

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        h += self.attention_norm(self.attention_out(o, rows), rows)
        h += self.mlp_norm(self.mlp(h, rows), rows)
