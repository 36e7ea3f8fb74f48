"""A step never makes the host wait for the device: no value that is there is read, from batch to outputs.

On CPUs a guard refuses to read tensors; torch's `meta` device has no values that could be read at all, and
runs what GPUs run but for vLLM's kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.support.device_reads import DeviceRead, no_device_reads
from tests.support.grouped import multiplied_by
from tests.support.random_models import CONFIGS, LAYERS, Model, S, random_model
from vllm_armt.core.pages import LayerPages
from vllm_armt.executor.step import Planner, Step
from vllm_armt.executor.tails import run_tails
from vllm_armt.executor.wave import run_wave
from vllm_armt.integration import builder as builder_module
from vllm_armt.integration.builder import PagedLayer, StepBuilder
from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.linear.base import Gemm
from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.grouped import GroupedGemm
from vllm_armt.linear.onednn import OneDNNGemm
from vllm_armt.options import SCHEDULES, Options
from vllm_armt.recurrence.carried import Carried

CLOSING = [
    "armt",
    "armt with heads",
    "armt with local layers",
    "armt_sw with a sink",
    "armt_sw with growing positions",
    "prmt that closes",
    "rmt that closes",
]
"""Models that write every full segment."""
OPEN = ["armt from the right", "armt with the keys before", "rmt with the keys before", "prmt in equal parts"]
"""Models for which it matters how long a prompt is, as its last segment stays open."""
MIXED = [
    (0, 3 * S + 1),  # whole segments from the start, and a tail
    (2 * S, 2 * S),  # whole segments from a memory on, up to a boundary: lanes of two lengths
    (1, 1),  # a decode in the first segment
    (S - 1, 1),  # one that closes it
    (3 * S - 1, 1),  # one that closes a later segment
    (S + 1, 2),  # the rest of a prompt, over the keys in a page
    (0, 2),  # the start of a prompt
    (2 * S, 1),  # a decode that opens a segment
]
"""Computed and scheduled tokens of requests."""
DECODES = [(2 * S, 1), (S + 1, 1), (5 * S + 2, 1)]
"""Requests that all read one row, which is the step that serving consists of."""
PADDING = 2


@dataclass(frozen=True)
class Device:
    """Where and how a step runs."""

    name: str
    attention: str
    gemm: type[Gemm]
    dtype: torch.dtype = torch.float32


DEVICES = [
    pytest.param(Device("cpu", "vllm_cpu", OneDNNGemm), id="cpu, vllm_cpu"),
    pytest.param(Device("cpu", "sdpa", OneDNNGemm), id="cpu, sdpa"),
    pytest.param(Device("meta", "sdpa", BatchedGemm), id="meta, batched"),
    pytest.param(Device("meta", "sdpa", GroupedGemm, torch.bfloat16), id="meta, grouped"),
]


def model_on(device: Device, name: str) -> Model:
    """A small model with pages of zeros."""
    where = torch.device(device.name)
    attention = "sdpa" if CONFIGS[name].window else device.attention
    with multiplied_by(device.gemm):
        model = random_model(CONFIGS[name], attention, dtype=device.dtype, device=where)
    rotary = model.parts.layers.rotary  # type: ignore[attr-defined]
    if device.name == "meta" and rotary is not None:
        # vLLM's kernel has no form without values
        rotary.rope.forward = rotary.rope.forward_native
    pool = torch.zeros(1 + 8 * len(MIXED), LAYERS, model.layout.page_bytes, dtype=torch.int8, device=where)
    pages = [LayerPages(model.layout, pool[:, layer]) for layer in range(LAYERS)]
    return dataclasses.replace(model, parts=dataclasses.replace(model.parts, pages=pages))


@pytest.fixture(autouse=True)
def nothing_to_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare configuration names no model that the log could begin with."""
    monkeypatch.setattr(builder_module, "announce", lambda *_: None)


def builder_of(model: Model, schedule: str, device: Device) -> StepBuilder:
    """A builder as vLLM makes it: of the layers that it finds by name."""
    where, parts = torch.device(device.name), model.parts
    planner = Planner(model.config, Options(schedule), parts.attention, parts.recurrence, device.dtype, where)
    planner.has_grouped_mm = device.gemm is GroupedGemm
    vllm_config = VllmConfig()
    assert parts.pages
    layer = PagedLayer(model.layout, planner, vllm_config, "layers.0.pages")
    layer.pages = parts.pages[0]
    return StepBuilder(SegmentSpec.create(S, model.layout.page_bytes), ["layers.0.pages"], vllm_config, where)


def batch_of(requests: list[tuple[int, int]], runner: str, device: str) -> CommonAttentionMetadata:
    """Requests as a model runner presents them: what it has on the host, and all else on the device.

    V1 cuts persistent buffers of the host, and may pad with requests that have no tokens
    (vllm/v1/worker/gpu_model_runner.py); V2 wraps numpy arrays (vllm/v1/worker/gpu/attn_utils.py).
    """
    scheduled = [n for _, n in requests]
    starts = np.cumsum([0, *scheduled], dtype=np.int32)
    ends = np.array([computed + n for computed, n in requests], dtype=np.int32)
    if runner == "V1":
        starts = np.concatenate([starts, np.full(PADDING + 3, starts[-1])])
        ends = np.concatenate([ends, np.zeros(PADDING + 3, dtype=np.int32)])
        rows = len(requests) + PADDING
        query_start_loc_cpu, seq_lens_cpu = torch.tensor(starts)[: rows + 1], torch.tensor(ends)[:rows]
    else:
        rows = len(requests)
        query_start_loc_cpu, seq_lens_cpu = torch.from_numpy(starts), torch.from_numpy(ends)
    table = torch.zeros(rows, 8, dtype=torch.int32)
    table[: len(requests)] = 1 + torch.arange(8 * len(requests), dtype=torch.int32).view(-1, 8)
    tokens = sum(scheduled)
    return CommonAttentionMetadata(
        query_start_loc=query_start_loc_cpu.clone().to(device),
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=seq_lens_cpu.clone().to(device),
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=max(scheduled),
        max_seq_len=int(ends.max()),
        block_table_tensor=table.to(device),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        positions=torch.zeros(tokens, dtype=torch.int64, device=device),
        # where the lengths of prompts matter, what is generated goes past them
        rswa_prefix_lens=torch.clamp(seq_lens_cpu - 1, min=1),
    )


def host_side(batch: CommonAttentionMetadata) -> list[torch.Tensor]:
    """What the runners keep on the host and builders may read."""
    assert batch.seq_lens_cpu_upper_bound is not None
    assert batch.rswa_prefix_lens is not None
    return [batch.query_start_loc_cpu, batch.seq_lens_cpu_upper_bound, batch.rswa_prefix_lens]


def has_every_part(step: Step, has_ends: bool) -> bool:
    """Whether it starts and resumes documents, keeps what they leave, begins segments and closes them."""
    assert step.wave
    assert step.tails
    entries, recurrence = step.wave.entries.values(), step.tails.recurrence
    is_carried = isinstance(recurrence, Carried)
    closings = (recurrence.closing if is_carried else recurrence.closings[0]).first
    return (
        any(entry.empty.numel() for entry in entries)
        and any(entry.resumed.numel() for entry in entries)
        and bool(step.wave.snapshots)
        and (recurrence.opening is not None if is_carried else len(recurrence.reads) > 1)
        and closings.shape == (2,)
        and bool(step.wave.ends) == has_ends
    )


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CLOSING)
def test_a_step_is_planned_and_run_without_waiting_for_the_device(
    name: str, device: Device, schedule: str, runner: str
):
    torch.manual_seed(0)
    model = model_on(device, name)
    parts, builder = model.parts, builder_of(model, schedule, device)
    batch = batch_of(MIXED, runner, device.name)
    inputs = torch.randn(batch.num_actual_tokens, model.hidden_size, dtype=device.dtype).to(device.name)
    outputs = torch.full_like(inputs, torch.nan)
    with no_device_reads(host_side(batch)):
        step = builder.build(0, batch)
        assert step.wave
        assert step.tails
        run_wave(parts, step.wave, inputs, outputs)
        run_tails(parts, step.tails, inputs, outputs)
    is_swept = schedule != "sequential" and not step.wave.wave.by_segment
    assert has_every_part(step, device.gemm is GroupedGemm and is_swept)
    if device.name == "cpu":
        assert outputs.isfinite().all()


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*CLOSING, *OPEN])
def test_a_step_of_decodes_is_planned_and_run_without_waiting_for_the_device(name: str, device: Device, runner: str):
    torch.manual_seed(0)
    model = model_on(device, name)
    parts, builder = model.parts, builder_of(model, "auto", device)
    batch = batch_of(DECODES, runner, device.name)
    inputs = torch.randn(batch.num_actual_tokens, model.hidden_size, dtype=device.dtype).to(device.name)
    outputs = torch.full_like(inputs, torch.nan)
    with no_device_reads(host_side(batch)):
        step = builder.build(0, batch)
        assert step.wave is None
        assert step.tails
        run_tails(parts, step.tails, inputs, outputs)
    if device.name == "cpu":
        assert outputs.isfinite().all()


def test_a_builder_that_read_the_block_table_would_be_noticed():
    batch = batch_of(MIXED, "V2", "cpu")
    with no_device_reads(host_side(batch)), pytest.raises(DeviceRead):
        batch.block_table_tensor.tolist()
