"""Gemma as grouped decoder layers: Llama's, with norms around `1 + w` and scaled embeddings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from vllm_armt.linear.norm import StackedRMSNorm
from vllm_armt.models.backbones.decoder import Architecture, only
from vllm_armt.models.backbones.llama import LlamaLayers


class StackedGemmaNorm(StackedRMSNorm):
    """`x / rms(x) * (1 + w) * factor`, computed in float32 whatever the model's dtype (HF `GemmaRMSNorm`)."""

    def __init__(self, num_layers: int, size: int, dtype: torch.dtype, eps: float, factor: float = 1.0) -> None:
        super().__init__(num_layers, size, torch.float32, eps)
        self.factor = factor

    def scale(self, layers: int | slice) -> Tensor:
        scale = 1 + super().scale(layers)
        return scale if self.factor == 1 else scale * self.factor


class GemmaLayers(LlamaLayers):
    """L Gemma decoder layers (HF `GemmaDecoderLayer`)."""

    @staticmethod
    def architecture(config: PretrainedConfig, act: str = "hidden_act") -> Architecture:
        only(config, use_bidirectional_attention=False)
        return replace(LlamaLayers.architecture(config, act), norm=partial(StackedGemmaNorm, eps=config.rms_norm_eps))

    @staticmethod
    def final_norm(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype)

    def embed(self, embeddings: Tensor) -> Tensor:
        # the factor is rounded to the model's dtype (HF `GemmaTextScaledWordEmbedding`)
        d = embeddings.shape[-1]
        return embeddings * torch.tensor(d**0.5, dtype=embeddings.dtype)
