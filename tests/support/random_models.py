"""Small random models of every system, and poisoned pages to run them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config

from tests.support.grouped import grouped_layers, on_rank, process_weights
from vllm_armt.attention import AttentionShape, LayerAttention
from vllm_armt.config import ARMTConfig, ARMTSWConfig, PRMTConfig, RecurrentConfig, RMTConfig
from vllm_armt.core.pages import LayerPages, PageLayout
from vllm_armt.executor.parts import ModelParts
from vllm_armt.models.backbones import layers_class
from vllm_armt.recurrence import Recurrence
from vllm_armt.recurrence.armt import ARMTRecurrence
from vllm_armt.recurrence.armt_projections import MemoryProjections
from vllm_armt.recurrence.prmt import PRMTRecurrence
from vllm_armt.recurrence.rmt import RMTRecurrence

CPU = torch.device("cpu")
S, m, LAYERS = 4, 2, 3
HEAD_DIM = 32
"""The least that every backend of attention takes."""
LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    vocab_size=8,
)
GPT2 = GPT2Config(
    n_embd=HEAD_DIM,
    n_inner=24,
    n_layer=LAYERS,
    n_head=1,
    vocab_size=8,
    n_positions=128,
    bos_token_id=None,
    eos_token_id=None,
)
GEMMA3 = Gemma3TextConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    vocab_size=8,
    sliding_window=3,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    max_position_embeddings=2048,
)
"""Its local layers see less than a segment."""
SEGMENT: dict[str, Any] = {"segment_size": S, "num_mem_tokens": m}
ON_LLAMA = SEGMENT | {"base_model_config": LLAMA}
ON_GPT2 = SEGMENT | {"base_model_config": GPT2}
ON_GEMMA3 = SEGMENT | {"base_model_config": GEMMA3}
ARMT: dict[str, Any] = {"d_mem": 8}
# of as many features a head
HEADS: dict[str, Any] = {"d_mem": 16, "n_heads": 2}
RELEASED: dict[str, Any] = {"wrap_pos": True, "sliding_window": True, "generation_policy": "open"}
IL08: dict[str, Any] = {"memory_attention": "full", "window_edge": "rows", "window_positions": "grow"}
CONFIGS: dict[str, RecurrentConfig] = {
    "armt": ARMTConfig(**ON_LLAMA, **ARMT),
    "armt v1": ARMTConfig(**ON_LLAMA, **ARMT, variant="v1"),
    "armt with heads": ARMTConfig(**ON_LLAMA, **HEADS),
    "armt with gating": ARMTConfig(**ON_LLAMA, **HEADS, gating=True),
    "armt without denominator": ARMTConfig(**ON_LLAMA, **HEADS, use_denom=False),
    "armt without correction": ARMTConfig(**ON_LLAMA, **ARMT, correction=False),
    "armt with memory in some layers": ARMTConfig(**ON_LLAMA, **ARMT, wrap_layers=[True, False, True]),
    "armt that stays open": ARMTConfig(**ON_LLAMA, **ARMT, generation_policy="open"),
    "armt from the right": ARMTConfig(**ON_LLAMA, **ARMT, generation_policy="open", segment_alignment="right"),
    "armt in equal parts": ARMTConfig(**ON_LLAMA, **ARMT, generation_policy="open", segment_alignment="center"),
    "armt with growing positions": ARMTConfig(**ON_GPT2, **ARMT),
    "armt with the keys before": ARMTConfig(**ON_GPT2, **ARMT, **RELEASED, variant="v1"),
    "armt with local layers": ARMTConfig(**ON_GEMMA3, **ARMT),
    "armt whose memory tokens see one another": ARMTConfig(**ON_LLAMA, **ARMT, use_sink=True, memory_attention="full"),
    "armt with full memory attention from the right": ARMTConfig(
        **ON_LLAMA, **ARMT, memory_attention="full", generation_policy="open", segment_alignment="right"
    ),
    "armt_sw": ARMTSWConfig(**ON_LLAMA, **ARMT),
    "armt_sw by rows with a sink": ARMTSWConfig(**ON_LLAMA, **ARMT, **IL08, use_sink=True),
    "armt_sw with a sink": ARMTSWConfig(**ON_LLAMA, **ARMT, use_sink=True),
    "armt_sw with growing positions": ARMTSWConfig(**ON_GPT2, **ARMT, use_sink=True),
    "rmt": RMTConfig(**ON_LLAMA, segment_alignment="right"),
    "rmt that closes": RMTConfig(**ON_GPT2, generation_policy="commit"),
    "rmt with the keys before": RMTConfig(**ON_GPT2, **RELEASED),
    "rmt with local layers": RMTConfig(**ON_GEMMA3),
    "prmt": PRMTConfig(**ON_LLAMA),
    "prmt that closes": PRMTConfig(**ON_GPT2, wrap_pos=True, generation_policy="commit"),
    "prmt in equal parts": PRMTConfig(**ON_LLAMA, segment_alignment="center"),
    "prmt as intended": PRMTConfig(**ON_LLAMA, aliased=False, segment_alignment="right"),
}
"""Every system, and everything about it that an executor can see, at least once."""


def backends(name: str) -> list[str]:
    """The backends of attention that run a model of `CONFIGS` on a CPU."""
    config = CONFIGS[name]
    return ["sdpa"] if config.window or config.full_suffix else ["sdpa", "vllm_cpu"]


@dataclass(frozen=True)
class Model:
    """A model whose memory changes its outputs.

    Attributes:
        config: what it computes.
        parts: what the executors run; it has no pages.
        layout: of its pages.
        memory: the checkpoint's tensors of the system. Of an ARMT "around", the rows around the tokens
            `[prefix + m, d]`, and by name, stacked over layers, W_mq, W_mk, W_mv, W_mb and the bias b of beta; of a
            PRMT and an RMT "initial", `[L, m, d]` and `[m, d]`.
    """

    config: RecurrentConfig
    parts: ModelParts
    layout: PageLayout
    memory: dict[str, Tensor]

    @property
    def hidden_size(self) -> int:
        return self.config.base_model_config.hidden_size


def random_model(
    config: RecurrentConfig,
    attention: str = "auto",
    *,
    key_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Model:
    """A model of a configuration, the same in every dtype: its weights are such as bfloat16 can hold.

    Args:
        config: of the model.
        attention: the backend.
        key_scale: multiplies W_mk.
        dtype: of weights and activations.
        device: of everything.
    """
    generator = torch.Generator().manual_seed(0)
    base = config.base_model_config
    d = base.hidden_size

    def normal(*shape: int, mean: float = 0.0, std: float = d**-0.5) -> Tensor:
        values = mean + std * torch.randn(shape, generator=generator)
        return values.bfloat16().to(device, dtype)

    layers: Any = grouped_layers(base, config.num_positions, dtype=dtype, device=device)
    with set_current_vllm_config(VllmConfig()):
        norm = layers_class(base).final_norm(base, dtype).to(device)
    for module in (layers, norm):
        module.requires_grad_(False)
        for name, parameter in module.named_parameters():
            is_scale = name.endswith("weight") and (module is norm or "norm." in name)
            parameter.data = normal(*parameter.shape, mean=float(is_scale))
    process_weights(layers)
    positions = None
    if config.backbone.positions is not None:
        positions = nn.Embedding.from_pretrained(normal(base.max_position_embeddings + config.extra_positions, d))
    memory = _random_memory(config, normal, key_scale)
    layout = config.page_layout(layers.kv_heads, layers.head_dim, dtype)
    shape = AttentionShape(
        dtype,
        layers.heads,
        layers.kv_heads,
        layers.head_dim,
        config.segment_layout,
        layout.columns,
        config.window,
    )
    backend = LayerAttention.choose(attention, device, shape, config.reaches)
    move = layers.moving_back(config.window_shift) if config.window_shift else None
    recurrence = _recurrence(config, memory, norm)
    return Model(
        config,
        ModelParts(layers, recurrence, backend, config.segment_layout, positions, config.window, None, move),
        layout,
        memory,
    )


def random_embeddings(model: Model, rows: int) -> Tensor:
    """Embeddings `[rows, d]` that have something in common, as queries and keys have then.

    So all features overlap, as wide ones do, and memories divide by nearly nothing less often.
    """
    return torch.randn(rows, model.hidden_size) + 1


def _random_memory(config: RecurrentConfig, normal: Callable[..., Tensor], key_scale: float) -> dict[str, Tensor]:
    L, d = LAYERS, config.base_model_config.hidden_size
    if isinstance(config, ARMTConfig):
        return {
            "around": normal(config.segment_layout.prefix + m, d, mean=1, std=1),
            "W_mq": normal(L, config.d_mem, d, mean=1 / d),
            "W_mk": normal(L, config.d_mem, d, mean=1 / d) * key_scale,
            "W_mv": normal(L, d, d) / 2,
            "W_mb": normal(L, config.beta_size, d, std=1 / d),
            "b": normal(L, config.beta_size, mean=1),
        }
    return {"initial": normal(L, m, d) if isinstance(config, PRMTConfig) else normal(m, d)}


def _recurrence(config: RecurrentConfig, memory: dict[str, Tensor], norm: nn.Module) -> Recurrence:
    if isinstance(config, PRMTConfig):
        return PRMTRecurrence(nn.Parameter(memory["initial"], requires_grad=False), config.aliased)
    if not isinstance(config, ARMTConfig):
        return RMTRecurrence(nn.Parameter(memory["initial"], requires_grad=False), LAYERS, norm)
    around, d = memory["around"], config.base_model_config.hidden_size
    with on_rank(), around.device:
        projections = MemoryProjections(LAYERS, d, config.d_mem, config.beta_size, config.memory_rule, around.dtype)
    for layer, has_memory in enumerate(config.has_memory):
        if has_memory:
            projections.read_projection.weight.load("W_mq", layer, memory["W_mq"][layer])
            for name in ("W_mk", "W_mv", "W_mb"):
                projections.write_projection.weight.load(name, layer, memory[name][layer])
            projections.write_projection.weights["bias"].load("W_mb", layer, memory["b"][layer])
    process_weights(projections)
    return ARMTRecurrence(projections, nn.Parameter(around, requires_grad=False), m)


class Pool:
    """Pages of all layers, which lie side by side; every byte that was not written is part of a NaN.

    Attributes:
        layers: per layer, the views of its pages.
    """

    def __init__(self, layout: PageLayout, pages: int) -> None:
        self._bytes = torch.full((pages, LAYERS, layout.page_bytes), -1, dtype=torch.int8)
        self.layers = [LayerPages(layout, self._bytes[:, layer]) for layer in range(LAYERS)]

    def poison(self, page: int) -> None:
        self._bytes[page] = -1

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo what is written meanwhile."""
        before = self._bytes.clone()
        yield
        self._bytes.copy_(before)

    def is_poisoned(self, page: int) -> bool:
        """Whether a page was never written."""
        return bool((self._bytes[page] == -1).all())
