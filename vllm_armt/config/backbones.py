"""The base models that are supported: where each keeps its parts, and the file that runs its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

Reaches = list[int | None]
"""Per layer, the rows of its sliding window; None where it has none."""


def _no_window(config: PretrainedConfig) -> Reaches:
    return [None] * config.num_hidden_layers


def _same_window(config: PretrainedConfig) -> Reaches:
    return [config.sliding_window] * config.num_hidden_layers


def _windows_by_type(config: PretrainedConfig) -> Reaches:
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def _windows_of_gpt_neo(config: PretrainedConfig) -> Reaches:
    return [config.window_size if kind == "local" else None for kind in config.attention_layers]


@dataclass(frozen=True)
class Backbone:
    """A kind of base model.

    Attributes:
        implementation: `module:class` of its grouped decoder layers, in `vllm_armt.models.backbones`.
        layers, embeddings, norm, head: names of its decoder layers, token embeddings, final norm and head,
            from the causal language model down, as files spell them.
        positions: of its learned position embeddings; None if it has none.
        reaches: from its configuration to the sliding windows of its layers.
    """

    implementation: str
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    positions: str | None = None
    reaches: Callable[[PretrainedConfig], Reaches] = _no_window


_LLAMA = "llama:LlamaLayers"

BACKBONES = {
    "gemma": Backbone("gemma:GemmaLayers"),
    "gemma3_text": Backbone("gemma3:Gemma3Layers", reaches=_windows_by_type),
    "llama": Backbone(_LLAMA),
    "mistral": Backbone(_LLAMA, reaches=_same_window),
    "olmo2": Backbone("olmo2:Olmo2Layers"),
    "phi3": Backbone("phi3:Phi3Layers", reaches=_same_window),
    "qwen2": Backbone(_LLAMA, reaches=_windows_by_type),
    "qwen3": Backbone(_LLAMA, reaches=_windows_by_type),
    "smollm3": Backbone("smollm3:SmolLM3Layers", reaches=_windows_by_type),
    "gpt2": Backbone(
        "gpt2:GPT2Layers", "transformer.h", "transformer.wte", "transformer.ln_f", positions="transformer.wpe"
    ),
    "gpt_neo": Backbone(
        "gpt_neo:GPTNeoLayers",
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        positions="transformer.wpe",
        reaches=_windows_of_gpt_neo,
    ),
    "gpt_neox": Backbone(
        "gpt_neox:GPTNeoXLayers",
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        "embed_out",
    ),
}
"""By `model_type` of the base model's configuration."""


def supported_backbones() -> str:
    """Their names, for messages."""
    return ", ".join(sorted(BACKBONES))
