"""The schedules against one another, and their rounding errors against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.random_models import CONFIGS, CPU, LAYERS, Model, S, random_embeddings, random_model
from vllm_armt.executor.naive import recompute
from vllm_armt.executor.wave import run_wave
from vllm_armt.linear.norm import StackedRMSNorm
from vllm_armt.plan.step import Chunk, Schedule, plan_step
from vllm_armt.plan.wave import WaveMetadata

SEGMENTS = 24
ARMT = CONFIGS["armt"]


def run(model: Model, mode: str, inputs: Tensor) -> Tensor:
    layout, flow = model.config.segment_layout, model.parts.recurrence.flow
    schedule = Schedule(mode, 1000, LAYERS, S, layout.rows, flow)
    wave = plan_step([Chunk(0, 0, 0, len(inputs), model.config.segmentation(1))], schedule).wave
    assert wave is not None
    outputs = torch.full_like(inputs, torch.nan)
    run_wave(model.parts, WaveMetadata.build(wave, LAYERS, False, None, CPU), inputs, outputs)
    return outputs


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", ["armt", "armt_sw with a sink", "prmt that closes"])
def test_in_float32_the_schedules_differ_by_rounding_alone(name: str):
    torch.manual_seed(0)
    model = random_model(CONFIGS[name])
    inputs = random_embeddings(model, 17 * S)
    assert distance(run(model, "diagonal", inputs), run(model, "sequential", inputs)) <= 1e-5


def test_in_bfloat16_the_diagonal_is_as_near_to_float64_as_the_sequential_order(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    low = random_model(ARMT, dtype=torch.bfloat16)
    inputs = random_embeddings(low, SEGMENTS * S).bfloat16()
    diagonal, sequential = (run(low, mode, inputs) for mode in ("diagonal", "sequential"))

    # the kernels know no float64, torch's own operators do
    monkeypatch.setattr(StackedRMSNorm, "_has_kernel", lambda self, x, rows: False)
    high = random_model(ARMT, dtype=torch.float64)
    rotary = high.parts.layers.rotary.rope  # type: ignore[attr-defined]
    monkeypatch.setattr(rotary, "forward", rotary.forward_native)
    exact, _ = recompute(high, inputs.double(), ARMT.segmentation(1))

    error = distance(sequential, exact)
    # a narrow random model makes much of rounding
    assert 1e-3 < error < 0.1
    assert distance(diagonal, exact) <= 1.1 * error
    assert distance(diagonal, sequential) <= error
