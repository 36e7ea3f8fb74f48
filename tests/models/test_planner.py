"""The planner: from vLLM's batch to a step, and the rehearsal that memory profiling runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.diagonal.reference import CONFIG, HIDDEN, LAYERS, S, m, random_stack
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.plan import Chunk
from vllm_armt.diagonal.wave import run_wave
from vllm_armt.models.step import TARGET_ROWS, Planner, StepBuilder

CPU = torch.device("cpu")
ARMT = ARMTConfig(base_model_config=CONFIG, segment_size=S, num_mem_tokens=m, d_mem=2)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(ARMT, "auto", CPU)


def test_the_schedule_is_that_of_the_model_and_the_device(planner: Planner):
    schedule = planner.schedule
    assert (schedule.mode, schedule.num_layers, schedule.cell_rows) == ("auto", LAYERS, S + m)
    assert schedule.target_rows == TARGET_ROWS["cpu"]
    assert Planner(ARMT, "auto", torch.device("xpu")).schedule.target_rows == TARGET_ROWS["cuda"]


def test_a_step_holds_only_what_there_is_to_do(planner: Planner):
    table = torch.zeros(1, 4, dtype=torch.int32)
    wave_only = planner.step([Chunk(0, 0, 0, 2 * S)], table)
    assert (wave_only.wave is None, wave_only.tails is None) == (False, True)
    tails_only = planner.step([Chunk(0, 0, 2 * S, 2 * S + 1)], table)
    assert (tails_only.wave is None, tails_only.tails is None) == (True, False)


@pytest.mark.parametrize("num_tokens", [1, S - 1, S, S + 1, 5 * S, 5 * S + 3])
def test_a_rehearsal_computes_every_row_without_pages(planner: Planner, num_tokens: int):
    step = planner.rehearsal(num_tokens)
    inputs = torch.randn(num_tokens, HIDDEN)
    outputs = torch.full_like(inputs, torch.nan)
    stack = random_stack()
    if step.wave:
        run_wave(stack, step.wave, inputs, outputs)
    if step.tails:
        run_open(stack, step.tails, inputs, outputs)
    assert outputs.isfinite().all()


def test_a_batch_of_vllms_becomes_chunks_of_the_requests_that_have_tokens():
    asked = []
    builder = StepBuilder.__new__(StepBuilder)
    builder.planner = SimpleNamespace(step=lambda chunks, table: asked.append(chunks))
    builder.build(
        0,
        SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 5, 5, 6]),
            seq_lens_cpu_upper_bound=torch.tensor([13, 4, 9]),
            block_table_tensor=None,
        ),
    )
    assert asked == [[Chunk(0, 0, 8, 13), Chunk(2, 5, 8, 9)]]
