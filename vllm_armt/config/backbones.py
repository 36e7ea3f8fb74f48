"""The base models that are supported: where each keeps its parts, and the file that runs its layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """A kind of base model.

    Attributes:
        implementation: `module:class` of its grouped decoder layers, in `vllm_armt.models.backbones`.
        layers, embeddings, norm, head: names of its decoder layers, token embeddings, final norm and head,
            from the causal language model down, as files spell them.
        positions: of its learned position embeddings; None if it has none.
    """

    implementation: str
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    positions: str | None = None


_LLAMA = Backbone("llama:LlamaLayers")

BACKBONES = {
    "gemma": Backbone("gemma:GemmaLayers"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Backbone(
        "gpt2:GPT2Layers", "transformer.h", "transformer.wte", "transformer.ln_f", positions="transformer.wpe"
    ),
    "gpt_neo": Backbone(
        "gpt_neo:GPTNeoLayers", "transformer.h", "transformer.wte", "transformer.ln_f", positions="transformer.wpe"
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
