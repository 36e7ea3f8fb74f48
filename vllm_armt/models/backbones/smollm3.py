"""SmolLM3 as grouped decoder layers: Llama's, of which every fourth has no positions at all."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_armt.models.backbones.llama import LlamaLayers


class SmolLM3Layers(LlamaLayers):
    """L SmolLM3 decoder layers (HF `SmolLM3DecoderLayer`)."""

    @staticmethod
    def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any] | None]:
        # transformers' name says the opposite of what it holds: 1 for a layer that rotates
        return [config.rope_parameters if rotates else None for rotates in config.no_rope_layers]
