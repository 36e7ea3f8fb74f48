"""Tensor parallelism: what ranks exchange in a step. One more collective per cell would undo what grouping gains."""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from tests.support.grouped import grouped_layers, on_rank, process_weights
from vllm_armt.attention import AttentionShape, LayerAttention
from vllm_armt.config import ARMTConfig
from vllm_armt.core import Segmentation
from vllm_armt.core.pages import LayerPages
from vllm_armt.executor.parts import ModelParts
from vllm_armt.executor.step import Planner
from vllm_armt.executor.tails import run_tails
from vllm_armt.executor.wave import run_wave
from vllm_armt.linear import stacked
from vllm_armt.options import Options
from vllm_armt.plan.step import Chunk
from vllm_armt.recurrence.armt import ARMTRecurrence
from vllm_armt.recurrence.armt_projections import MemoryProjections

CPU = torch.device("cpu")
S, m, D_MEM, LAYERS, HEAD_DIM, HEADS = 4, 2, 2, 3, 32, 4
HIDDEN = HEADS * HEAD_DIM
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 8,
}
BASES = [
    pytest.param(LlamaConfig(**SIZES, num_key_value_heads=2), id="llama"),
    pytest.param(GPT2Config(n_embd=HIDDEN, n_inner=24, n_layer=LAYERS, n_head=HEADS, vocab_size=8), id="gpt2"),
    pytest.param(GPTNeoXConfig(**SIZES), id="gpt_neox"),
    pytest.param(GPTNeoXConfig(**SIZES, use_parallel_residual=False), id="gpt_neox without parallel residual"),
]


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are all-reduced. Any other collective fails: there is no group of ranks."""
    shapes: list[tuple[int, ...]] = []

    def all_reduce(y: Tensor) -> Tensor:
        shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(stacked, "tensor_model_parallel_all_reduce", all_reduce)
    return shapes


def first_rank(
    base: PretrainedConfig, world_size: int, options: Options | None = None, attention: str = "sdpa"
) -> tuple[ModelParts, Planner]:
    """An ARMT on the first of so many ranks, and what plans its steps."""
    config = ARMTConfig(base_model_config=base, segment_size=S, num_mem_tokens=m, d_mem=D_MEM)
    generator = torch.Generator().manual_seed(0)
    layers = grouped_layers(base, config.segment_layout.rows, 0, world_size)
    with on_rank(0, world_size):
        projections = MemoryProjections(LAYERS, HIDDEN, D_MEM, config.beta_size, config.memory_rule, torch.float32)
    recurrence = ARMTRecurrence(projections, nn.Parameter(torch.empty(m, HIDDEN), requires_grad=False), m)
    for parameter in [*layers.parameters(), *recurrence.parameters()]:
        parameter.data.normal_(std=1 / math.sqrt(HIDDEN), generator=generator)
    process_weights(layers)
    process_weights(recurrence)
    layout = config.page_layout(layers.kv_heads, HEAD_DIM, torch.float32)
    pool = torch.zeros(9, LAYERS, layout.page_bytes, dtype=torch.int8)
    pages = [LayerPages(layout, pool[:, layer]) for layer in range(LAYERS)]
    backend = LayerAttention.choose(
        attention,
        CPU,
        AttentionShape(
            torch.float32,
            layers.heads,
            layers.kv_heads,
            HEAD_DIM,
            config.segment_layout,
            layout.columns,
            config.window,
        ),
        config.reaches,
    )
    positions = nn.Embedding(64, HIDDEN).requires_grad_(False) if config.backbone.positions else None
    parts = ModelParts(layers, recurrence, backend, config.segment_layout, positions, config.window, pages)
    return parts, Planner(config, options or Options(), backend, recurrence, torch.float32, CPU)


@pytest.mark.parametrize("lengths", [[1], [5], [4, 2, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize(
    ("schedule", "max_cells"), [("diagonal", 100), ("diagonal", 2), ("auto", 5), ("sequential", 100), ("sequential", 2)]
)
@pytest.mark.parametrize("base", BASES)
def test_a_grouped_forward_reduces_twice_whatever_the_number_of_its_cells(
    base: PretrainedConfig, schedule: str, max_cells: int, lengths: list[int], reduced: list[tuple[int, ...]]
):
    options = Options(schedule=schedule, target_rows=max_cells * (S + m))
    parts, planner = first_rank(base, 2, options)
    starts = list(accumulate((length * S for length in lengths), initial=0))
    chunks = [Chunk(request, starts[request], 0, n * S, Segmentation(S)) for request, n in enumerate(lengths)]
    index = planner.step(chunks, None, None).wave
    assert index is not None
    inputs = torch.randn(starts[-1], HIDDEN)
    run_wave(dataclasses.replace(parts, pages=None), index, inputs, torch.empty_like(inputs))
    groups = list(index.wave.groups(LAYERS))
    assert reduced == [(group.cells * (S + m), HIDDEN) for group in groups for _ in ("attention", "MLP")]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param([(0, 0, 2 * S, 2 * S + 1)], id="one decode"),
        pytest.param([(i, i, i + 1, i + 2) for i in range(6)], id="decodes that read and close"),
        pytest.param([(0, 0, 1, 3), (1, 2, S, S + 1), (2, 3, 2 * S - 1, 2 * S)], id="mixed"),
    ],
)
@pytest.mark.parametrize("attention", ["vllm_cpu", "sdpa"])
@pytest.mark.parametrize("base", BASES)
def test_open_rows_reduce_twice_a_layer_whatever_the_number_of_requests(
    base: PretrainedConfig, attention: str, step: list[tuple[int, int, int, int]], reduced: list[tuple[int, ...]]
):
    parts, planner = first_rank(base, 2, attention=attention)
    chunks = [Chunk(*chunk, Segmentation(S)) for chunk in step]
    assert parts.pages
    planned = planner.step(chunks, torch.arange(1, 9, dtype=torch.int32).repeat(6, 1), parts.pages[0])
    assert planned.wave is None
    assert planned.tails is not None
    tokens = sum(chunk.end - chunk.start for chunk in chunks)
    inputs = torch.randn(tokens, HIDDEN)
    run_tails(parts, planned.tails, inputs, torch.empty_like(inputs))
    rows = tokens + m * sum(chunk.end % S == 0 for chunk in chunks)
    assert reduced == [(rows, HIDDEN)] * 2 * LAYERS


@pytest.mark.parametrize("base", BASES)
def test_a_single_rank_reduces_nothing(base: PretrainedConfig, reduced: list[tuple[int, ...]]):
    parts, planner = first_rank(base, 1)
    index = planner.step([Chunk(0, 0, 0, 2 * S, Segmentation(S))], None, None).wave
    assert index is not None
    inputs = torch.randn(2 * S, HIDDEN)
    run_wave(dataclasses.replace(parts, pages=None), index, inputs, torch.empty_like(inputs))
    assert not reduced
