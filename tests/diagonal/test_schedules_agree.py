"""The schedules against one another, and their rounding errors against float64."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diagonal.reference import HIDDEN, LAYERS, S, m, random_stack, recompute
from vllm_armt.diagonal.norm import StackedRMSNorm
from vllm_armt.diagonal.plan import Chunk, Schedule, plan_step
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.wave import WaveIndex, run_wave

CPU = torch.device("cpu")
SEGMENTS = 24


def rounded_stack() -> Stack:
    """A float32 model whose weights bfloat16 can hold."""
    stack = random_stack()
    for parameter in [*stack.layers.parameters(), *stack.memory.parameters()]:  # type: ignore[attr-defined]
        parameter.data = parameter.data.bfloat16().float()
    return dataclasses.replace(stack, memory_tokens=stack.memory_tokens.bfloat16().float())


def to(stack: Stack, dtype: torch.dtype) -> Stack:
    layers: Any = copy.deepcopy(stack.layers)
    memory = copy.deepcopy(stack.memory).to(dtype)
    return dataclasses.replace(
        stack, layers=layers.to(dtype), memory=memory, memory_tokens=stack.memory_tokens.to(dtype)
    )


def run(stack: Stack, mode: str, inputs: Tensor) -> Tensor:
    wave = plan_step([Chunk(0, 0, 0, len(inputs))], S, Schedule(mode, 1000, LAYERS, S + m)).wave
    assert wave is not None
    outputs = torch.full_like(inputs, torch.nan)
    index = WaveIndex.build(wave, LAYERS, False, None, CPU)
    run_wave(stack, index, inputs, outputs)
    return outputs


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_in_float32_the_schedules_differ_by_rounding_alone():
    torch.manual_seed(0)
    stack, inputs = random_stack(), torch.randn(SEGMENTS * S, HIDDEN)
    assert distance(run(stack, "diagonal", inputs), run(stack, "sequential", inputs)) <= 1e-5


def test_in_bfloat16_the_diagonal_is_as_near_to_float64_as_the_sequential_order(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    stack, inputs = rounded_stack(), torch.randn(SEGMENTS * S, HIDDEN).bfloat16()
    low = to(stack, torch.bfloat16)
    diagonal, sequential = (run(low, mode, inputs) for mode in ("diagonal", "sequential"))

    # the kernels know no float64, torch's own operators do; and what is float32 in a memory is float64 here
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr("vllm_armt.diagonal.stacked._can_pack", lambda: False)
    monkeypatch.setattr(StackedRMSNorm, "_has_kernel", lambda self, x: False)
    exact_stack = to(stack, torch.float64)
    rotary = exact_stack.layers.rotary  # type: ignore[attr-defined]
    monkeypatch.setattr(rotary, "forward", rotary.forward_native)
    exact, _ = recompute(exact_stack, inputs.double())

    error = distance(sequential, exact)
    # a narrow random model makes much of rounding
    assert 1e-3 < error < 0.1
    assert distance(diagonal, exact) <= 1.1 * error
    assert distance(diagonal, sequential) <= error
