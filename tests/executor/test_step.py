"""The planner: from vLLM's batch to a step, and the dummy step that memory profiling runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from tests.support.random_models import CONFIGS, CPU, HEAD_DIM, LAYERS, Pool, S, backends, m, random_model
from vllm_armt.core import Segmentation
from vllm_armt.executor.step import TARGET_ROWS, Planner
from vllm_armt.executor.tails import run_tails
from vllm_armt.executor.wave import run_wave
from vllm_armt.integration import builder as builder_module
from vllm_armt.integration.builder import PagedLayer, StepBuilder
from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.options import Options
from vllm_armt.plan.step import Chunk, Flow, plan_step

LEFT = Segmentation(S)


def planner_of(
    name: str = "armt",
    attention: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    **options: Any,
) -> Planner:
    model = random_model(CONFIGS[name], attention)
    return Planner(model.config, Options(**options), model.parts.attention, model.parts.recurrence, dtype, device)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of()


def test_the_schedule_is_that_of_the_model_and_the_device(planner: Planner):
    schedule = planner.schedule
    assert (schedule.mode, schedule.num_layers, schedule.segment_size) == ("auto", LAYERS, S)
    assert (schedule.cell_rows, schedule.flow) == (S + m, Flow.SAME_LAYER)
    assert planner_of("rmt").schedule.cell_rows == m + S + m
    assert planner_of("rmt").schedule.flow is Flow.TOP_LAYER
    assert planner_of("prmt").schedule.flow is Flow.DIAGONAL
    assert schedule.target_rows == TARGET_ROWS["cpu"]
    assert planner_of(dtype=torch.float32).schedule.target_rows == TARGET_ROWS["cpu"] // 2
    assert planner_of(device=torch.device("xpu")).schedule.target_rows == TARGET_ROWS["cuda"]


def test_the_rows_that_fill_the_device_may_be_given():
    assert planner_of(target_rows=7).schedule.target_rows == 7


def test_a_step_holds_only_what_there_is_to_do(planner: Planner):
    table, pages = torch.zeros(1, 4, dtype=torch.int32), Pool(random_model(CONFIGS["armt"]).layout, 1).layers[0]
    wave_only = planner.step([Chunk(0, 0, 0, 2 * S, LEFT)], table, pages)
    assert (wave_only.wave is None, wave_only.tails is None) == (False, True)
    tails_only = planner.step([Chunk(0, 0, 2 * S, 2 * S + 1, LEFT)], table, pages)
    assert (tails_only.wave is None, tails_only.tails is None) == (True, False)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in CONFIGS for attention in backends(name)],
)
@pytest.mark.parametrize("num_tokens", [1, S, 5 * S + 3])
def test_a_rehearsal_computes_every_row_without_pages(name: str, attention: str, num_tokens: int):
    model = random_model(CONFIGS[name], attention)
    parts = model.parts
    planner = Planner(model.config, Options(), parts.attention, parts.recurrence, torch.float32, CPU)
    step = planner.dummy_step(num_tokens, max_documents=3, max_length=4 * S)
    inputs = torch.randn(num_tokens, model.hidden_size)
    outputs = torch.full_like(inputs, torch.nan)
    if step.wave:
        run_wave(parts, step.wave, inputs, outputs)
    if step.tails:
        run_tails(parts, step.tails, inputs, outputs)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("max_documents", [1, 4, 100])
def test_a_rehearsal_holds_as_many_memories_as_any_step(max_documents: int):
    planner = planner_of(target_rows=32 * (S + m))
    rehearsed = planner.dummy_step(64 * S, max_documents, max_length=64 * S).wave
    assert rehearsed is not None
    most = len(rehearsed.wave.lanes) * rehearsed.wave.depth
    for documents in range(1, min(max_documents, 64) + 1):
        chunks = [Chunk(i, 0, 0, 64 // documents * S, LEFT) for i in range(documents)]
        wave = plan_step(chunks, planner.schedule).wave
        assert wave is not None
        assert len(wave.lanes) * wave.depth <= most, documents
    assert max_documents == 1 or most > LAYERS


def test_no_document_of_a_rehearsal_is_longer_than_one_may_be(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    seen: list[Chunk] = []
    monkeypatch.setattr(planner, "step", lambda chunks, *_: seen.extend(chunks))
    planner.dummy_step(41 * S + 1, max_documents=2, max_length=4 * S + 1)
    assert max(chunk.end for chunk in seen) <= 4 * S
    assert sum(chunk.end for chunk in seen) == 41 * S + 1


def test_the_builder_plans_with_the_planner_of_the_layers_that_it_builds_for(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    # a bare configuration names no model that the log could begin with
    monkeypatch.setattr(builder_module, "announce", lambda *_: None)
    vllm_config = VllmConfig()
    layout = CONFIGS["armt"].page_layout(2, HEAD_DIM, torch.float32)
    for name in ("another model's", "this model's"):
        PagedLayer(layout, planner if name == "this model's" else planner_of(), vllm_config, name)
    spec = SegmentSpec.create(S, layout.page_bytes)
    assert StepBuilder(spec, ["this model's"], vllm_config, CPU).planner is planner


@pytest.mark.parametrize("name", ["armt", "armt from the right"])
def test_a_batch_of_vllms_becomes_chunks_of_the_requests_that_have_tokens(name: str):
    asked = []
    builder: Any = StepBuilder.__new__(StepBuilder)
    planner = planner_of(name)
    builder.layer = SimpleNamespace(pages=None)
    builder.planner = SimpleNamespace(
        step=lambda chunks, *_: asked.append(chunks),
        segmentation=planner.segmentation,
        needs_prompt_length=planner.needs_prompt_length,
    )
    prompts = [13, 4, 7]
    builder.build(
        0,
        SimpleNamespace(
            num_reqs=3,
            query_start_loc_cpu=torch.tensor([0, 5, 5, 6]),
            seq_lens_cpu_upper_bound=torch.tensor([13, 4, 9]),
            rswa_prefix_lens=torch.tensor(prompts, dtype=torch.int32) if planner.needs_prompt_length else None,
            block_table_tensor=None,
        ),
    )
    first, second = (CONFIGS[name].segmentation(prompts[i]) for i in (0, 2))
    assert asked == [[Chunk(0, 0, 8, 13, first), Chunk(2, 5, 8, 9, second)]]
