"""Tensor parallelism: what ranks exchange in a step. One more collective per cell would undo what grouping gains."""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tests.diagonal.reference import (
    CONFIG,
    D_MEM,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    S,
    llama_layers,
    m,
    on_rank,
    random_stack,
)
from vllm_armt.cache.pages import LayerPages, PageLayout
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal import stacked
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.memory import StackedMemory
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.plan import Chunk, Schedule, plan_step
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.wave import WaveIndex, run_wave
from vllm_armt.models.step import Planner
from vllm_armt.options import Options

CPU = torch.device("cpu")
WORLD_SIZE = 2
ARMT = ARMTConfig(base_model_config=CONFIG, segment_size=S, num_mem_tokens=m, d_mem=D_MEM)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are all-reduced. Any other collective fails: there is no group of ranks."""
    shapes: list[tuple[int, ...]] = []

    def all_reduce(y: Tensor) -> Tensor:
        shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(stacked, "tensor_model_parallel_all_reduce", all_reduce)
    return shapes


@pytest.fixture(params=["vllm_cpu", "sdpa"])
def stack(request: pytest.FixtureRequest) -> Stack:
    """The first of two ranks."""
    generator = torch.Generator().manual_seed(0)
    layers = llama_layers(CONFIG, S + m, 0, WORLD_SIZE)
    with on_rank(0, WORLD_SIZE):
        memory = StackedMemory(LAYERS, HIDDEN, D_MEM, ARMT.memory_rule, torch.float32)
    for parameter in [*layers.parameters(), *memory.parameters()]:
        parameter.data.normal_(std=1 / math.sqrt(HIDDEN), generator=generator)
    layout = PageLayout(S, m, layers.kv_heads, HEAD_DIM, torch.float32, 6 * D_MEM, HIDDEN, torch.float32)
    pool = torch.zeros(9, LAYERS, layout.page_bytes, dtype=torch.int8)
    pages = [LayerPages(layout, pool[:, layer]) for layer in range(LAYERS)]
    backend = choose_attention(request.param, CPU, torch.float32, HEAD_DIM, S + m)
    return Stack(layers, memory, backend, torch.randn(m, HIDDEN, generator=generator), pages, S)


@pytest.mark.parametrize("lengths", [[1], [5], [4, 2, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize(
    ("mode", "max_cells"), [("diagonal", 100), ("diagonal", 2), ("auto", 5), ("sequential", 100), ("sequential", 2)]
)
def test_a_grouped_forward_reduces_twice_whatever_the_number_of_its_cells(
    lengths: list[int], mode: str, max_cells: int, stack: Stack, reduced: list[tuple[int, ...]]
):
    starts = list(accumulate((length * S for length in lengths), initial=0))
    step = [Chunk(request, starts[request], 0, length * S) for request, length in enumerate(lengths)]
    wave = plan_step(step, S, Schedule(mode, max_cells * (S + m), LAYERS, S + m)).wave
    assert wave is not None
    index = WaveIndex.build(wave, LAYERS, False, None, CPU)
    inputs = torch.randn(starts[-1], HIDDEN)
    run_wave(dataclasses.replace(stack, pages=None), index, inputs, torch.empty_like(inputs))
    groups = list(wave.groups(LAYERS))
    assert reduced == [(group.cells * (S + m), HIDDEN) for group in groups for _ in ("o_proj", "down_proj")]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param([Chunk(0, 0, 2 * S, 2 * S + 1)], id="one decode"),
        pytest.param([Chunk(i, i, i + 1, i + 2) for i in range(6)], id="decodes that read and close"),
        pytest.param([Chunk(0, 0, 1, 3), Chunk(1, 2, S, S + 1), Chunk(2, 3, 2 * S - 1, 2 * S)], id="mixed"),
    ],
)
def test_open_rows_reduce_twice_a_layer_whatever_the_number_of_requests(
    step: list[Chunk], stack: Stack, reduced: list[tuple[int, ...]]
):
    table = torch.arange(1, 9, dtype=torch.int32).repeat(6, 1)
    planned = Planner(ARMT, Options(), stack.attention, torch.float32, CPU).step(step, table)
    assert planned.wave is None
    assert planned.tails is not None
    tokens = sum(chunk.end - chunk.start for chunk in step)
    inputs = torch.randn(tokens, HIDDEN)
    run_open(stack, planned.tails, inputs, torch.empty_like(inputs))
    rows = tokens + m * sum(chunk.end % S == 0 for chunk in step)
    assert reduced == [(rows, HIDDEN)] * 2 * LAYERS


def test_a_single_rank_reduces_nothing(reduced: list[tuple[int, ...]]):
    wave = plan_step([Chunk(0, 0, 0, 2 * S)], S, Schedule("auto", 1000, LAYERS, S + m)).wave
    assert wave is not None
    inputs = torch.randn(2 * S, HIDDEN)
    run_wave(random_stack(), WaveIndex.build(wave, LAYERS, False, None, CPU), inputs, torch.empty_like(inputs))
    assert not reduced
