"""Small random models of every system, on backbones of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.golden_cases import ROOT
from vllm_armt.hf import MODELS, RecurrentForCausalLM

S, M_TOKENS, D_MEM = 8, 3, 4
NARROW, WIDE = 6, 64
"""Local layers reach over less than a segment, or over one and the one before."""

_GOLDENS = {
    "llama": "armt_llama_gqa_tied",
    "qwen2": "armt_qwen2",
    "qwen3": "armt_qwen3",
    "gpt2": "armt_gpt2_wrap",
    "gpt_neox": "armt_neox",
}


@dataclass(frozen=True)
class Small:
    """A kind of small model: its system's `model_type`, its backbone's, and further fields of its configuration.

    `layers` are the base model's; None for as many as the goldens have. Its local layers, if it has some, see `reach`
    rows; None for less than a segment, unless that sees the one before.
    """

    system: str
    backbone: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None
    reach: int | None = None

    @property
    def name(self) -> str:
        return "-".join([self.system, self.backbone, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def has_window(self) -> bool:
        """Whether a segment attends to the keys of the one before."""
        return self.system == "armt_sw" or self.options.get("sliding_window", False)

    def build(self, dtype: torch.dtype = torch.float32) -> RecurrentForCausalLM:
        """A fresh one around a base model of this dtype, whose memory changes the logits; "commit" by default."""
        sizes: dict[str, Any] = {"segment_size": S, "num_mem_tokens": M_TOKENS, "generation_policy": "commit"}
        if self.system.startswith("armt"):
            sizes["d_mem"] = D_MEM
        base = tiny_base(self.backbone, self.layers, self.reach or (WIDE if self.has_window else NARROW)).to(dtype)
        model = MODELS[self.system].from_base(base, **(sizes | self.options))
        for name, parameter in model.named_parameters():
            if name.endswith("W_mv.weight"):
                nn.init.normal_(parameter, std=0.5)
        return model.eval()


IL08 = {"memory_attention": "full", "window_edge": "rows", "window_positions": "grow"}
KINDS = [
    Small("armt", "llama"),
    Small("armt", "gpt2"),
    Small("armt", "gpt_neox", {"n_heads": 2}),
    Small("armt", "qwen2", {"n_heads": 2, "gating": True, "use_denom": False}),
    Small("armt", "gpt2", {"variant": "v1", "wrap_pos": True, "sliding_window": True}),
    Small("armt", "gemma3_text", {"d_mem": 16}),
    Small("armt", "llama", {"use_sink": True, "memory_attention": "full"}),
    Small("armt_sw", "llama", {"use_sink": True}),
    Small("armt_sw", "gpt2", {"use_sink": True}),
    Small("armt_sw", "mistral"),
    Small("armt_sw", "llama", {"use_sink": True} | IL08),
    Small("prmt", "gpt2", {"wrap_pos": True}),
    Small("prmt", "llama", {"aliased": False}),
    Small("rmt", "qwen3"),
    Small("rmt", "gpt2", {"wrap_pos": True, "sliding_window": True}),
    Small("rmt", "gpt2", {"learned_positions": "grow"}),
]
"""Between them every system, every backbone and every option that changes what flows."""


def by_name(kind: Small) -> str:
    """For pytest's ids."""
    return kind.name


def tiny_base(backbone: str, layers: int | None = None, reach: int = NARROW) -> PreTrainedModel:
    """A tiny base model with random weights, larger than trained ones so that every row matters.

    Args:
        backbone: its `model_type`.
        layers: of it; None for as many as the goldens have.
        reach: of its local layers, if it has some.
    """
    torch.manual_seed(0)
    if backbone in _GOLDENS:
        config = AutoConfig.from_pretrained(ROOT / _GOLDENS[backbone] / "base_config")
        if layers is not None:
            # those of Qwen are one by one said to attend fully
            config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    else:
        config = _without_golden(backbone, layers or 3, reach)
    config.initializer_range = 0.1
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _without_golden(backbone: str, layers: int, reach: int) -> PretrainedConfig:
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
    if backbone == "gpt_neo":
        kinds = [[["global", "local"][i % 2 :][:1], 1] for i in range(layers)]
        return GPTNeoConfig(**sizes, num_layers=layers, num_heads=4, attention_types=kinds, window_size=reach)
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    if backbone == "gemma":
        return GemmaConfig(**sizes, **heads, head_dim=16)
    if backbone == "gemma3_text":
        types = [["sliding_attention", "full_attention"][i % 2] for i in range(layers)]
        return Gemma3TextConfig(
            **sizes, **heads, head_dim=32, query_pre_attn_scalar=16, sliding_window=reach, layer_types=types
        )
    if backbone in ("olmo2", "phi3", "smollm3"):
        own: dict[str, dict[str, Any]] = {
            "olmo2": {},
            "phi3": {"sliding_window": reach},
            "smollm3": {"no_rope_layer_interval": 2},
        }
        return CONFIG_MAPPING[backbone](**sizes, **heads, **own[backbone], bos_token_id=None, pad_token_id=None)
    return MistralConfig(**sizes, **heads, sliding_window=reach)


def text(length: int, batch: int = 1) -> Tensor:
    """Random tokens `[batch, length]`."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))
