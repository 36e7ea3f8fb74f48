"""The readable truth of a step: one document at a time, segment after segment, layer after layer."""

from __future__ import annotations

import math
from collections import defaultdict
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_armt.cache.pages import LayerPages, PageLayout
from vllm_armt.core import MemoryRule
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.memory import StackedMemory
from vllm_armt.diagonal.rows import Rows
from vllm_armt.diagonal.stack import Stack
from vllm_armt.models.backbones.llama import LlamaLayers

S, m, D_MEM, LAYERS, HIDDEN = 4, 2, 2, 3, 16
HEAD_DIM = 32
"""The least that every backend of attention takes."""
CONFIG = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    vocab_size=8,
)
Memory = list[tuple[Tensor, Tensor]]
"""Per layer, M and z."""


def on_rank(rank: int = 0, world_size: int = 1):
    """Pretend to be one of `world_size` tensor-parallel ranks while modules are built."""
    return patch.multiple(
        "vllm_armt.diagonal.stacked",
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_world_size=lambda: world_size,
    )


def llama_layers(config, segment_rows: int, rank: int = 0, world_size: int = 1) -> LlamaLayers:
    """Grouped layers of a configuration, their weights not yet loaded."""
    world = patch("vllm_armt.models.backbones.llama.get_tensor_model_parallel_world_size", lambda: world_size)
    with on_rank(rank, world_size), world, set_current_vllm_config(VllmConfig()):
        return LlamaLayers(config, segment_rows, torch.float32)


def random_stack(rule: MemoryRule | None = None, key_scale: float = 1.0, attention: str = "auto") -> Stack:
    """A small model whose memory changes its outputs; it has no pages yet. `key_scale` multiplies W_mk."""
    generator = torch.Generator().manual_seed(0)
    layers = llama_layers(CONFIG, S + m)
    with on_rank():
        memory = StackedMemory(LAYERS, HIDDEN, D_MEM, rule or MemoryRule(), torch.float32)
    for parameter in [*layers.parameters(), *memory.parameters()]:
        parameter.data.normal_(std=1 / math.sqrt(HIDDEN), generator=generator)
    memory.write_projection.weight.data[:, :D_MEM] *= key_scale
    backend = choose_attention(attention, torch.device("cpu"), torch.float32, HEAD_DIM, S + m)
    return Stack(layers, memory, backend, torch.randn(m, HIDDEN, generator=generator), None, S)


def poisoned_pages(pages: int, state_dtype: torch.dtype = torch.float32) -> list[LayerPages]:
    """Per layer, views of one pool whose every byte is part of a NaN; layers lie side by side in a page."""
    layout = PageLayout(S, m, 2, HEAD_DIM, torch.float32, 6 * D_MEM, HIDDEN, state_dtype)
    pool = torch.full((pages, LAYERS, layout.page_bytes), -1, dtype=torch.int8)
    return [LayerPages(layout, pool[:, layer]) for layer in range(LAYERS)]


def is_poisoned(pages: list[LayerPages], page: int) -> bool:
    """Whether a page was never written."""
    views = [view for layer in pages for view in (layer.M, layer.z, layer.k, layer.v)]
    return all(bool(view[page].isnan().all()) for view in views)


def recompute(stack: Stack, document: Tensor) -> tuple[Tensor, dict[int, Memory]]:
    """The last layer's outputs of a document's embeddings `[T, d]`, and the memory after each closed segment."""
    rule = stack.memory.rule
    memories: dict[int, Memory] = defaultdict(list)
    outputs = []
    for s, tokens in enumerate(document.split(S)):
        closes = len(tokens) == S
        h = torch.cat([tokens, stack.memory_tokens]) if closes else tokens
        for layer in range(LAYERS):
            rows = Rows(layer, (len(h),))
            M, z = memories[s - 1][layer] if s else (h.new_zeros(6 * D_MEM, HIDDEN), h.new_zeros(6 * D_MEM))
            if s:
                h = h + rule.read(stack.memory.queries(h, rows), M, z)
            h = h.clone()
            o = _attend(*stack.layers.project(h, rows, torch.arange(len(h))))
            stack.layers.complete(h, o, rows)
            if closes:
                k, v, beta = stack.memory.writes(h[S:], Rows(layer, (m,)))
                residual, dz = rule.update(k, v, beta, k @ M, z, first=s == 0)
                memories[s].append((M + k.T @ residual, z + dz))
        outputs.append(h[: len(tokens)])
    return torch.cat(outputs), memories


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, head by head."""
    share = q.shape[1] // k.shape[1]
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[2])
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, head // share])
    return torch.cat(heads, dim=1)
