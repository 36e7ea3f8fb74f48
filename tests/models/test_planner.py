"""The planner: from vLLM's batch to a step, and the rehearsal that memory profiling runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from tests.diagonal.reference import CONFIG, HEAD_DIM, HIDDEN, LAYERS, S, m, random_stack
from vllm_armt.cache import SegmentSpec
from vllm_armt.cache.pages import PageLayout
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.plan import Chunk
from vllm_armt.diagonal.wave import run_wave
from vllm_armt.models.step import TARGET_ROWS, PagedLayer, Planner, StepBuilder
from vllm_armt.options import Options

CPU = torch.device("cpu")
ARMT = ARMTConfig(base_model_config=CONFIG, segment_size=S, num_mem_tokens=m, d_mem=2)


def planner_of(attention: str = "auto", dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU) -> Planner:
    return Planner(ARMT, Options(), choose_attention(attention, CPU, torch.float32, HEAD_DIM, S + m), dtype, device)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of()


def test_the_schedule_is_that_of_the_model_and_the_device(planner: Planner):
    schedule = planner.schedule
    assert (schedule.mode, schedule.num_layers, schedule.cell_rows) == ("auto", LAYERS, S + m)
    assert schedule.target_rows == TARGET_ROWS["cpu"]
    assert planner_of(dtype=torch.float32).schedule.target_rows == TARGET_ROWS["cpu"] // 2
    assert planner_of(device=torch.device("xpu")).schedule.target_rows == TARGET_ROWS["cuda"]


def test_the_rows_that_fill_the_device_may_be_given(planner: Planner):
    assert Planner(ARMT, Options(target_rows=7), planner.attention, torch.float32, CPU).schedule.target_rows == 7


def test_a_step_holds_only_what_there_is_to_do(planner: Planner):
    table = torch.zeros(1, 4, dtype=torch.int32)
    wave_only = planner.step([Chunk(0, 0, 0, 2 * S)], table)
    assert (wave_only.wave is None, wave_only.tails is None) == (False, True)
    tails_only = planner.step([Chunk(0, 0, 2 * S, 2 * S + 1)], table)
    assert (tails_only.wave is None, tails_only.tails is None) == (True, False)


@pytest.mark.parametrize("attention", ["vllm_cpu", "sdpa"])
@pytest.mark.parametrize("num_tokens", [1, S - 1, S, S + 1, 5 * S, 5 * S + 3])
def test_a_rehearsal_computes_every_row_without_pages(attention: str, num_tokens: int):
    stack = random_stack(attention=attention)
    step = Planner(ARMT, Options(), stack.attention, torch.float32, CPU).rehearsal(num_tokens)
    inputs = torch.randn(num_tokens, HIDDEN)
    outputs = torch.full_like(inputs, torch.nan)
    if step.wave:
        run_wave(stack, step.wave, inputs, outputs)
    if step.tails:
        run_open(stack, step.tails, inputs, outputs)
    assert outputs.isfinite().all()


def test_the_builder_plans_with_the_planner_of_the_layers_that_it_builds_for(planner: Planner):
    vllm_config = VllmConfig()
    layout = PageLayout(S, m, 2, HEAD_DIM, torch.float32, 12, HIDDEN, torch.float32)
    for name in ("another model's", "this model's"):
        PagedLayer(layout, planner if name == "this model's" else planner_of(), vllm_config, name)
    spec = SegmentSpec.create(S, layout.page_bytes)
    assert StepBuilder(spec, ["this model's"], vllm_config, CPU).planner is planner


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
