"""Grouped Llama-family layers against those of transformers, and cut over tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.diagonal.reference import llama_layers
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.rows import Rows
from vllm_armt.models.backbones.llama import LlamaLayers

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 64,
}
T = 7
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = [
    pytest.param(LlamaConfig(**SIZES), id="llama"),
    pytest.param(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), id="llama with biases"),
    pytest.param(LlamaConfig(**SIZES, head_dim=6), id="llama with narrow heads"),
    pytest.param(LlamaConfig(**SIZES, rope_parameters=SCALED_ROPE), id="llama with scaled positions"),
    pytest.param(MistralConfig(**SIZES), id="mistral"),
    pytest.param(Qwen2Config(**SIZES), id="qwen2"),
    pytest.param(Qwen3Config(**SIZES, head_dim=8), id="qwen3"),
]


def random_model(config: PretrainedConfig):
    """transformers' model with every weight, norms and biases included, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return model.model


def load(layers: LlamaLayers, model) -> None:
    slots = layers.slots()
    for i, layer in enumerate(model.layers):
        weights = layer.state_dict()
        assert weights.keys() == slots.keys()
        for name, tensor in weights.items():
            assert slots[name].shape == tuple(tensor.shape)
            slots[name].load(i, tensor)


# any head size
SDPA = choose_attention("sdpa", torch.device("cpu"), torch.float32, 4, T)
ROWS = [
    pytest.param(Rows(0, (T, T, T)), id="a cell a layer"),
    pytest.param(Rows(0, (T, 2 * T, 2 * T)), id="ragged"),
    pytest.param(Rows(1, (2 * T, 2 * T)), id="some layers"),
    pytest.param(Rows(2, (T,)), id="one layer"),
]


def positions(rows: Rows) -> Tensor:
    return torch.arange(T).repeat(sum(rows.counts) // T)


def run(layers: LlamaLayers, rows: Rows, h: Tensor) -> Tensor:
    """Layers over their cells of T rows in `[R, d]`: each over its own rows, as on a diagonal."""
    h = h.clone()
    layers.complete(h, SDPA.cells(*layers.project(h, rows, positions(rows)), T), rows)
    return h


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_group_of_layers_is_each_of_transformers_layers(config: PretrainedConfig, rows: Rows):
    model = random_model(config)
    layers = llama_layers(config, T)
    load(layers, model)
    h = torch.randn(sum(rows.counts), 16, generator=torch.Generator().manual_seed(1))
    rope = model.rotary_emb(h[None, :T], torch.arange(T)[None])
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        expected = [
            layer(cells.view(-1, T, 16), attention_mask=mask, position_embeddings=rope).flatten(0, 1)
            for layer, cells in zip(model.layers[rows.layers], h.split(rows.counts), strict=True)
        ]
    torch.testing.assert_close(run(layers, rows, h), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_projection_leaves_its_input_and_completion_changes_it_in_place():
    layers = llama_layers(LlamaConfig(**SIZES), T)
    load(layers, random_model(LlamaConfig(**SIZES)))
    rows = Rows(0, (T,))
    h = torch.randn(T, 16)
    before = h.clone()
    o = SDPA.cells(*layers.project(h, rows, positions(rows)), T)
    assert torch.equal(h, before)
    assert layers.complete(h, o, rows) is None
    assert not torch.equal(h, before)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_add_up_to_the_whole(world_size: int, monkeypatch: pytest.MonkeyPatch):
    """With four ranks there are fewer key heads than ranks."""
    config = Qwen3Config(**SIZES, head_dim=8)
    model = random_model(config)
    whole = llama_layers(config, T)
    load(whole, model)
    ranks = [llama_layers(config, T, rank, world_size) for rank in range(world_size)]
    for layers in ranks:
        load(layers, model)
    h = torch.randn(3 * T, 16, generator=torch.Generator().manual_seed(1))
    rows = Rows(0, (T, T, T))
    q, k, v = whole.project(h, rows, positions(rows))
    pieces = [layers.project(h, rows, positions(rows)) for layers in ranks]
    torch.testing.assert_close(torch.cat([piece[0] for piece in pieces], dim=1), q)
    assert all(piece[1].shape[1] == layers.kv_heads for layers, piece in zip(ranks, pieces, strict=True))
    for i, expected in ((1, k), (2, v)):
        heads = torch.cat([piece[i] for piece in pieces], dim=1)
        torch.testing.assert_close(heads, expected.repeat_interleave(heads.shape[1] // expected.shape[1], dim=1))

    partial: list[Tensor] = []

    def all_reduce(y: Tensor) -> Tensor:
        partial.append(y)
        return y

    monkeypatch.setattr("vllm_armt.diagonal.stacked.tensor_model_parallel_all_reduce", all_reduce)
    for layers, piece in zip(ranks, pieces, strict=True):
        layers.o_proj(SDPA.cells(*piece, T), rows)
    torch.testing.assert_close(torch.stack(partial).sum(0), whole.o_proj(SDPA.cells(q, k, v, T), rows))

    partial.clear()
    for layers in ranks:
        layers.down_proj(layers.act(layers.gate_up_proj(h, rows)), rows)
    torch.testing.assert_close(
        torch.stack(partial).sum(0), whole.down_proj(whole.act(whole.gate_up_proj(h, rows)), rows)
    )


def test_an_activation_other_than_silu_is_refused():
    with pytest.raises(ValueError, match=r"`hidden_act` of the base model is 'gelu'; only 'silu'"):
        llama_layers(LlamaConfig(**SIZES, hidden_act="gelu"), T)


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        pytest.param({}, 3, id="heads"),
        pytest.param({"intermediate_size": 22}, 4, id="MLP features"),
        pytest.param({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}, 2, id="key heads"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_refused(sizes: dict[str, int], world_size: int):
    with pytest.raises(ValueError, match=rf"can't be split over tensor_parallel_size={world_size}"):
        llama_layers(LlamaConfig(**(SIZES | sizes)), T, 0, world_size)
