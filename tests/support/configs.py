"""Configurations to test with: small, and complete unless a test says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from vllm_armt.config import CONFIGS, ARMTConfig

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,
}
REQUIRED = {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8}
GPT2_SIZES = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 8, "bos_token_id": None, "eos_token_id": None}

GPT_NEO_SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}

every_system = pytest.mark.parametrize("system", CONFIGS, ids=lambda system: system.model_type)


def config(base: Any = None, system: Any = ARMTConfig, **fields: Any) -> Any:
    """A configuration of `system` around a small Llama, or `base`."""
    required = {name: value for name, value in REQUIRED.items() if name in system.required}
    return system(**{"base_model_config": base or LlamaConfig(**SIZES)} | required | fields)


def gpt2(system: Any = ARMTConfig, positions: Any = 128, **fields: Any) -> Any:
    """A configuration of `system` around a small GPT-2."""
    return config(GPT2Config(**GPT2_SIZES, n_positions=positions), system, **fields)
