"""What vLLM derives from a config.json of ours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.hook_configs import BASES, S, model_config, wrapped
from vllm_armt.config import CONFIGS, RecurrentConfig
from vllm_armt.integration.hooks import (
    RecurrentArchConvertor,
)


def test_the_length_is_a_million_tokens_by_default_whatever_the_base_model_says(checkpoint: str):
    config = model_config(checkpoint)
    assert config.hf_text_config.max_position_embeddings == 1024
    assert config.max_model_len == 1_048_576


@pytest.mark.parametrize("max_model_len", [64, 1 << 22])
def test_another_length_may_be_asked_for_shorter_or_longer(checkpoint: str, max_model_len: int):
    assert model_config(checkpoint, max_model_len=max_model_len).max_model_len == max_model_len


def test_sizes_are_the_base_models(checkpoint: str):
    config = model_config(checkpoint)
    assert (config.get_vocab_size(), config.get_hidden_size()) == (192, 64)


def derived(config: RecurrentConfig) -> Any:
    return RecurrentArchConvertor(config, config.get_text_config()).convert()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.model_type)
def test_vllm_derives_the_same_of_every_system_and_backbone(config_class: type[RecurrentConfig], base: str):
    arch = derived(wrapped(config_class, base, learned_positions="restart"))
    assert (arch.model_type, arch.text_model_type) == (config_class.model_type, base)
    assert (arch.vocab_size, arch.hidden_size, arch.total_num_hidden_layers) == (96, 64, 3)
    assert (arch.total_num_attention_heads, arch.head_size) == (4, 16)
    assert arch.derived_max_model_len_and_key == (1 << 20, "max_context")


def test_learned_positions_that_grow_bound_the_length():
    config = wrapped(CONFIGS[0], "gpt2", learned_positions="grow")
    # 51 segments of 16 tokens and 4 memory tokens, and 4 tokens more
    assert derived(config).derived_max_model_len_and_key == (820, "learned positions of the base model")
    assert config.get_text_config().model_max_length == 820
    config = wrapped(CONFIGS[0], "gpt2", learned_positions="grow", max_context=64)
    assert derived(config).derived_max_model_len_and_key == (64, "max_context")


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_vllm_hands_out_prompt_lengths_where_segments_depend_on_them(alignment: str):
    config = wrapped(CONFIGS[0], generation_policy="open", segment_alignment=alignment)
    assert derived(config).rswa_window == S
    assert derived(wrapped(CONFIGS[0])).rswa_window is None
