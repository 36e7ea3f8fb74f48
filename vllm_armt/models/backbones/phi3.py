"""Phi-3 as grouped decoder layers: Llama's, whose files have q, k and v in one tensor, and gate and up in another."""

from __future__ import annotations

from functools import partial

import torch

from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.models.backbones.llama import LlamaLayers
from vllm_armt.models.weights import WeightTarget


class Phi3Layers(LlamaLayers):
    """L Phi-3 decoder layers (HF `Phi3DecoderLayer`); those with `longrope` positions are refused."""

    def weight_targets(self) -> dict[str, WeightTarget]:
        fused = {"self_attn.qkv_proj": self.qkv, "mlp.gate_up_proj": self.mlp_in}
        targets = super().weight_targets()
        for name, linear in fused.items():
            module = name.partition(".")[0]
            for part in WeightTarget.of_linear(module, linear):
                del targets[part]
            targets |= _one_behind_another(name, linear)
        return targets


def _one_behind_another(name: str, linear: StackedLinear) -> dict[str, WeightTarget]:
    sizes = [part.size for part in linear.weight.parts.values()]
    return WeightTarget.of_fused(name, linear, partial(torch.split, split_size_or_sections=sizes))
