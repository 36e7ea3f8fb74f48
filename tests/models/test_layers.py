"""Grouped layers of every backbone against those of transformers, and cut over tensor-parallel ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from vllm.config import VllmConfig, set_current_vllm_config

from tests.support.grouped import grouped_layers, process_weights
from vllm_armt.config import BACKBONES
from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones import layers_class
from vllm_armt.models.backbones.decoder import DecoderLayers

L, D, T, POSITIONS = 3, 16, 7, 64
SIZES = {
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "vocab_size": 8,
    "max_position_embeddings": POSITIONS,
}
GQA = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": D, "n_inner": 24, "n_layer": L, "n_head": 4, "vocab_size": 8, "n_positions": POSITIONS}
GPT_NEO = {
    "hidden_size": D,
    "intermediate_size": 24,
    "num_layers": L,
    "num_heads": 4,
    "vocab_size": 8,
    "max_position_embeddings": 2 * POSITIONS,
}
GLOBAL, LOCAL = [[["global"], L]], [[["local"], 1], [["global", "local"], 1]]
FULL, SLIDING = "full_attention", "sliding_attention"
BASE = {"rope_theta": 10000.0, "factor": 8.0}
LLAMA3 = BASE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = GQA | {"head_dim": 8, "layer_types": [FULL, SLIDING, SLIDING], "query_pre_attn_scalar": 5}
"""Of more than one base, whose scores are not scaled by the heads' width."""
GEMMA3_LINEAR = {FULL: BASE | {"rope_type": "linear"}, SLIDING: BASE | {"rope_type": "default", "rope_theta": 100.0}}
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "llama with biases": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
    "llama with narrow heads": LlamaConfig(**GQA, head_dim=6),
    "llama with gelu": LlamaConfig(**GQA, hidden_act="gelu"),
    "llama with llama3 positions": LlamaConfig(
        **GQA, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16}
    ),
    "llama with yarn positions": LlamaConfig(
        **GQA, rope_parameters=BASE | {"rope_type": "yarn", "original_max_position_embeddings": 8}
    ),
    "llama with linear positions": LlamaConfig(**GQA, rope_parameters=BASE | {"rope_type": "linear"}),
    "llama with dynamic positions": LlamaConfig(**GQA, rope_parameters=BASE | {"rope_type": "dynamic"}),
    "mistral": MistralConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=8),
    "gemma": GemmaConfig(**GQA, head_dim=8),
    "gemma with biases": GemmaConfig(**GQA, head_dim=8, attention_bias=True),
    "gemma3_text": Gemma3TextConfig(**GEMMA3),
    "gemma3_text with linear positions": Gemma3TextConfig(**GEMMA3, rope_parameters=GEMMA3_LINEAR),
    "olmo2": Olmo2Config(**GQA),
    "olmo2 with biases": Olmo2Config(**GQA, attention_bias=True),
    "phi3": Phi3Config(**GQA, pad_token_id=None),
    "phi3 with partly rotated heads": Phi3Config(
        **GQA | {"hidden_size": D}, pad_token_id=None, partial_rotary_factor=0.5
    ),
    "smollm3": SmolLM3Config(**GQA, pad_token_id=None, no_rope_layers=[1, 0, 1]),
    "smollm3 without positions": SmolLM3Config(**GQA, pad_token_id=None, no_rope_layers=[0, 0, 0]),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 with a wide MLP": GPT2Config(**GPT2 | {"n_inner": None}),
    "gpt2 with relu": GPT2Config(**GPT2, activation_function="relu"),
    "gpt2 with reordered attention": GPT2Config(**GPT2, reorder_and_upcast_attn=True, attn_implementation="eager"),
    "gpt_neo": GPTNeoConfig(**GPT_NEO, attention_types=GLOBAL),
    "gpt_neo with local attention": GPTNeoConfig(**GPT_NEO, attention_types=LOCAL, window_size=T),
    "gpt_neo with a wide MLP": GPTNeoConfig(**GPT_NEO | {"intermediate_size": None}, attention_types=GLOBAL),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    "gpt_neox without parallel residual": GPTNeoXConfig(**SIZES, rotary_pct=0.5, use_parallel_residual=False),
    "gpt_neox without attention biases": GPTNeoXConfig(**SIZES, rotary_pct=0.5, attention_bias=False),
    "gpt_neox with wholly rotated heads": GPTNeoXConfig(**SIZES, rotary_pct=1.0, hidden_act="gelu_new"),
}
BY_BACKBONE = [pytest.param(CONFIGS[name], id=name) for name in sorted(BACKBONES)]
BY_CONFIG = [pytest.param(config, id=name) for name, config in CONFIGS.items()]
ROWS = [
    pytest.param(Rows(0, (T, T, T)), id="a cell a layer"),
    pytest.param(Rows(0, (T, 2 * T, 2 * T)), id="ragged"),
    pytest.param(Rows(1, (2 * T, 2 * T)), id="some layers"),
    pytest.param(Rows(2, (T,)), id="one layer"),
]


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """transformers' model with every weight, norms and biases included, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(BACKBONES[model.config.model_type].layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def load(layers: DecoderLayers, model: PreTrainedModel) -> None:
    targets = layers.weight_targets()
    for i, layer in enumerate(decoder_layers(model)):
        weights = layer.state_dict()
        assert weights.keys() == targets.keys()
        for name, tensor in weights.items():
            assert targets[name].shape == tuple(tensor.shape)
            targets[name].load(i, tensor)
    process_weights(layers)


def random_rows(count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within cells of T rows: `[R, heads, head_dim] -> [R, heads * head_dim]`."""
    q, k, v = (x.unflatten(0, (-1, T)).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2).flatten(0, 1).flatten(1)


def run(layers: DecoderLayers, rows: Rows, h: Tensor, first_position: int = 0) -> Tensor:
    """Layers over their cells of T rows in `[R, d]`: each over its own rows, as on a diagonal."""
    h = h.clone()
    positions = torch.arange(first_position, first_position + T).repeat(len(h) // T)
    layers.complete(h, attend(*layers.project(h, rows, positions)), rows)
    return h


def expected(model: PreTrainedModel, rows: Rows, h: Tensor, first_position: int = 0) -> Tensor:
    """What transformers' layers compute, one at a time."""
    outputs = []
    kinds = getattr(model.config, "layer_types", [None] * L)[rows.layers]
    for layer, kind, cells in zip(decoder_layers(model)[rows.layers], kinds, h.split(rows.counts), strict=True):
        x = cells.view(-1, T, D)
        given: dict[str, Any] = {
            "attention_mask": torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
        }
        if hasattr(model.base_model, "rotary_emb"):
            positions = torch.arange(first_position, first_position + T)
            of_kind = (kind,) if isinstance(model.config, Gemma3TextConfig) else ()
            given["position_embeddings"] = model.base_model.rotary_emb(x, positions[None], *of_kind)
        with torch.no_grad():
            output = layer(x, **given)
        # some hand their attention weights out too
        outputs.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", BY_CONFIG)
def test_a_group_of_layers_is_each_of_transformers_layers(config: PretrainedConfig, rows: Rows):
    model = random_model(config)
    layers = grouped_layers(config, T)
    load(layers, model)
    h = random_rows(sum(rows.counts))
    torch.testing.assert_close(run(layers, rows, h), expected(model, rows, h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", BY_BACKBONE)
def test_positions_may_lie_beyond_those_of_the_base_model(config: PretrainedConfig):
    model = random_model(config)
    layers = grouped_layers(config, POSITIONS + T)
    load(layers, model)
    rows, h = Rows(0, (T,)), random_rows(T)
    torch.testing.assert_close(
        run(layers, rows, h, POSITIONS), expected(model, rows, h, POSITIONS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("config", BY_BACKBONE)
def test_a_projection_leaves_its_input_and_completion_changes_it_in_place(config: PretrainedConfig):
    layers = grouped_layers(config, T)
    load(layers, random_model(config))
    rows, h = Rows(0, (T,)), random_rows(T)
    before = h.clone()
    o = attend(*layers.project(h, rows, torch.arange(T)))
    assert torch.equal(h, before)
    layers.complete(h, o, rows)
    assert not torch.equal(h, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", BY_BACKBONE)
def test_tokens_enter_as_transformers_embeds_them(config: PretrainedConfig, dtype: torch.dtype):
    embeddings = random_model(config).get_input_embeddings().to(dtype)
    tokens = torch.arange(8)
    layers = grouped_layers(config, T)
    assert torch.equal(layers.embed(embeddings.weight[tokens]), embeddings(tokens))


@pytest.mark.parametrize("config", BY_CONFIG)
def test_the_final_norm_is_that_of_transformers(config: PretrainedConfig):
    theirs = random_model(config).get_submodule(BACKBONES[config.model_type].norm)
    with set_current_vllm_config(VllmConfig()):
        ours = layers_class(config).final_norm(config, torch.float32)
    ours.load_state_dict(theirs.state_dict())
    h = random_rows(T)
    with torch.no_grad():
        torch.testing.assert_close(ours(h), theirs(h))


@pytest.mark.parametrize("config", BY_BACKBONE)
def test_a_final_norm_has_the_dtype_asked_for(config: PretrainedConfig):
    with set_current_vllm_config(VllmConfig()):
        norm = layers_class(config).final_norm(config, torch.bfloat16)
    assert {parameter.dtype for parameter in norm.parameters()} == {torch.bfloat16}


class Group:
    """Ranks that are threads and take turns: vLLM's products share one scratch pad."""

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.given: list[Tensor] = []

    def all_reduce(self, y: Tensor) -> Tensor:
        self.given.append(y)
        self._wait()
        total = torch.stack(self.given).sum(0)
        if self._wait() == 0:
            self.given.clear()
        self._wait()
        return total

    def _wait(self) -> int:
        self.turn.release()
        try:
            return self.barrier.wait()
        finally:
            self.turn.acquire()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("config", BY_CONFIG)
def test_ranks_make_up_the_whole(config: PretrainedConfig, world_size: int, monkeypatch: pytest.MonkeyPatch):
    """With four ranks there may be fewer key heads than ranks."""
    model = random_model(config)
    ranks = [grouped_layers(config, T, rank, world_size) for rank in range(world_size)]
    for layers in ranks:
        load(layers, model)
    group = Group(world_size)
    for module in ("norm", "stacked"):
        monkeypatch.setattr(f"vllm_armt.linear.{module}.tensor_model_parallel_all_reduce", group.all_reduce)
    rows = Rows(0, (T, 2 * T, 2 * T))
    h = random_rows(sum(rows.counts))

    def run_rank(layers: DecoderLayers) -> Tensor:
        with group.turn:
            k = layers.project(h, rows, torch.arange(T).repeat(5))[1]
            assert k.shape[1] == layers.kv_heads
            return run(layers, rows, h)

    with ThreadPoolExecutor(world_size) as threads:
        outputs = list(threads.map(run_rank, ranks))
    whole = expected(model, rows, h)
    for output in outputs:
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", BY_BACKBONE)
def test_an_unknown_activation_is_refused(config: PretrainedConfig):
    config = type(config)(**config.to_dict())
    field = next(name for name in ("hidden_act", "hidden_activation", "activation_function") if hasattr(config, name))
    setattr(config, field, "mish")
    with pytest.raises(ValueError, match=rf"`{field}` of the base model is 'mish'; supported: 'gelu', "):
        grouped_layers(config, T)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True)],
)
def test_options_of_gpt2_that_are_not_computed_are_refused(field: str, value: bool):
    with pytest.raises(ValueError, match=rf"`{field}` of the base model is {value}; only {not value} is supported"):
        grouped_layers(GPT2Config(**GPT2, **{field: value}), T)


def test_a_phi3_for_long_texts_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    with pytest.raises(ValueError, match=r"`rope_type` of the base model is 'longrope'; supported: 'default'"):
        grouped_layers(Phi3Config(**GQA, pad_token_id=None, rope_parameters=rope), T)


def test_a_gemma3_whose_scores_are_squashed_is_refused():
    with pytest.raises(
        ValueError, match=r"`attn_logit_softcapping` of the base model is 50\.0; only False is supported"
    ):
        grouped_layers(Gemma3TextConfig(**GEMMA3, attn_logit_softcapping=50.0), T)


def test_a_gemma_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match=r"`use_bidirectional_attention` .* only False is supported"):
        grouped_layers(GemmaConfig(**GQA, head_dim=8, use_bidirectional_attention=True), T)


@pytest.mark.parametrize(
    ("rope", "num_positions", "message"),
    [
        pytest.param(
            {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
            T,
            r"`rope_type` of the base model is 'longrope'; supported: 'default'",
            id="longrope, which depends on the length of the text",
        ),
        pytest.param({"rope_type": "dynamic"}, POSITIONS + 1, r"65 positions can occur, but .* has 64\.", id="dynamic"),
        pytest.param({"rope_type": "yarn"}, POSITIONS + 1, r"65 positions can occur, but .* has 64\.", id="yarn"),
    ],
)
def test_rotary_positions_that_are_not_those_of_transformers_are_refused(
    rope: dict[str, Any], num_positions: int, message: str
):
    config = LlamaConfig(**GQA, rope_parameters=BASE | {"original_max_position_embeddings": 8} | rope)
    with pytest.raises(ValueError, match=message):
        grouped_layers(config, num_positions)


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        pytest.param(LlamaConfig(**GQA), 3, id="heads"),
        pytest.param(GPT2Config(**GPT2 | {"n_inner": 22}), 4, id="MLP features"),
        pytest.param(
            LlamaConfig(**GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}),
            2,
            id="key heads",
        ),
    ],
)
def test_sizes_that_ranks_cannot_share_are_refused(config: PretrainedConfig, world_size: int):
    with pytest.raises(ValueError, match=rf"can't be split over tensor_parallel_size={world_size}"):
        grouped_layers(config, T, 0, world_size)
