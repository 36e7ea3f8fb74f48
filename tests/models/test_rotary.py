"""Keys that are moved to smaller positions are those that the base model would have there."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from tests.support.grouped import grouped_layers
from vllm_armt.linear.rows import Rows

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(LlamaConfig(**SIZES, hidden_size=64, num_key_value_heads=1), id="llama"),
        pytest.param(LlamaConfig(**SIZES, hidden_size=64, num_key_value_heads=1, rope_parameters=YARN), id="yarn"),
        pytest.param(GPTNeoXConfig(**SIZES, hidden_size=64, rotary_pct=0.25), id="gpt_neox, a part of the channels"),
    ],
)
def test_a_key_that_is_moved_back_is_that_of_the_smaller_position(base: PretrainedConfig):
    layers = grouped_layers(base, 64)
    assert layers.rotary is not None
    k = torch.randn(7, layers.kv_heads * layers.head_dim)
    q, positions, distance = torch.randn(7, layers.heads * layers.head_dim), torch.arange(7), 21
    rows = Rows(0, (7,))
    here, there = (layers.rotary(at, q.clone(), k.clone(), rows)[1] for at in (positions + distance, positions))
    heads = (-1, layers.kv_heads, layers.head_dim)
    torch.testing.assert_close(layers.moving_back(distance)(here.view(heads)), there.view(heads), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_moved_back_is_refused():
    learned = GPT2Config(n_embd=32, n_inner=8, n_layer=1, n_head=1, n_positions=64)
    with pytest.raises(ValueError, match="needs rotary positions that are alike in all layers"):
        grouped_layers(learned, 64).moving_back(5)
    layers = grouped_layers(LlamaConfig(**SIZES, hidden_size=64, num_key_value_heads=1), 64)
    with pytest.raises(ValueError, match="lie 64 positions further back, which these rotary positions"):
        layers.moving_back(64)
