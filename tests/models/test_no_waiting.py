"""A step never makes the host wait for the device: no value that is there is read, from batch to outputs.

On CPUs a guard refuses to read tensors; torch's `meta` device has no values that could be read at all, and
runs what GPUs run but for vLLM's kernels.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.diagonal.device_reads import DeviceRead, no_device_reads
from tests.diagonal.reference import CONFIG, D_MEM, HEAD_DIM, HIDDEN, LAYERS, S, m, random_stack
from vllm_armt.cache import SegmentSpec
from vllm_armt.cache.pages import LayerPages, PageLayout
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.wave import run_wave
from vllm_armt.models.step import PagedLayer, Planner, Step, StepBuilder
from vllm_armt.options import SCHEDULES, Options

ARMT = ARMTConfig(base_model_config=CONFIG, segment_size=S, num_mem_tokens=m, d_mem=D_MEM)
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
    dtype: torch.dtype = torch.float32
    grouped_product: bool = False


DEVICES = [
    pytest.param(Device("cpu", "vllm_cpu"), id="cpu, vllm_cpu"),
    pytest.param(Device("cpu", "sdpa"), id="cpu, sdpa"),
    pytest.param(Device("meta", "sdpa"), id="meta, batched products"),
    pytest.param(Device("meta", "sdpa", torch.bfloat16, grouped_product=True), id="meta, grouped products"),
]


def stack_on(device: Device) -> Stack:
    """The small model with pages of zeros."""
    stack = random_stack(attention=device.attention)
    where = torch.device(device.name)
    # vLLM gives all layers of a shape the same positions, those of other tests too
    stack.layers.rotary = copy.deepcopy(stack.layers.rotary)  # type: ignore[attr-defined]
    stack.layers.to(where, device.dtype)  # type: ignore[attr-defined]
    stack.memory.to(where, device.dtype)
    if device.name == "meta":
        # vLLM's kernel has no form without values
        rotary = stack.layers.rotary  # type: ignore[attr-defined]
        rotary.forward = rotary.forward_native
    layout = PageLayout(S, m, 2, HEAD_DIM, device.dtype, 6 * D_MEM, HIDDEN, torch.float32)
    pool = torch.zeros(1 + 8 * len(MIXED), LAYERS, layout.page_bytes, dtype=torch.int8, device=where)
    return dataclasses.replace(
        stack,
        attention=choose_attention(device.attention, where, device.dtype, HEAD_DIM, S + m),
        memory_tokens=stack.memory_tokens.to(where, device.dtype),
        pages=[LayerPages(layout, pool[:, layer]) for layer in range(LAYERS)],
    )


def builder_of(stack: Stack, schedule: str, device: Device) -> StepBuilder:
    """A builder as vLLM makes it: of the layers that it finds by name."""
    where = torch.device(device.name)
    planner = Planner(ARMT, Options(schedule), stack.attention, device.dtype, where)
    planner.has_grouped_product = device.grouped_product
    layout = PageLayout(S, m, 2, HEAD_DIM, device.dtype, 6 * D_MEM, HIDDEN, torch.float32)
    vllm_config = VllmConfig()
    PagedLayer(layout, planner, vllm_config, "layers.0.pages")
    return StepBuilder(SegmentSpec.create(S, layout.page_bytes), ["layers.0.pages"], vllm_config, where)


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
    )


def host_side(batch: CommonAttentionMetadata) -> list[torch.Tensor]:
    """What the runners keep on the host and builders may read."""
    assert batch.seq_lens_cpu_upper_bound is not None
    return [batch.query_start_loc_cpu, batch.seq_lens_cpu_upper_bound]


def has_every_part(step: Step, grouped_product: bool) -> bool:
    """Whether it starts and resumes documents, keeps memories, reads in rows of several widths and closes segments."""
    assert step.wave
    assert step.tails
    assert step.tails.closings
    entries = step.wave.entries.values()
    return (
        any(entry.empty.numel() for entry in entries)
        and any(entry.resumed.numel() for entry in entries)
        and bool(step.wave.snapshots)
        and len(step.tails.reads) > 1
        and step.tails.closings.first.shape == (2,)
        and bool(step.wave.ends) == grouped_product
    )


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_planned_and_run_without_waiting_for_the_device(device: Device, schedule: str, runner: str):
    torch.manual_seed(0)
    stack = stack_on(device)
    builder = builder_of(stack, schedule, device)
    batch = batch_of(MIXED, runner, device.name)
    inputs = torch.randn(batch.num_actual_tokens, HIDDEN, dtype=device.dtype).to(device.name)
    outputs = torch.full_like(inputs, torch.nan)
    with no_device_reads(host_side(batch)):
        step = builder.build(0, batch)
        assert step.wave
        assert step.tails
        run_wave(stack, step.wave, inputs, outputs)
        run_open(stack, step.tails, inputs, outputs)
    assert has_every_part(step, device.grouped_product and schedule != "sequential")
    if device.name == "cpu":
        assert outputs.isfinite().all()


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_decodes_is_planned_and_run_without_waiting_for_the_device(device: Device, runner: str):
    torch.manual_seed(0)
    stack = stack_on(device)
    builder = builder_of(stack, "auto", device)
    batch = batch_of(DECODES, runner, device.name)
    inputs = torch.randn(batch.num_actual_tokens, HIDDEN, dtype=device.dtype).to(device.name)
    outputs = torch.full_like(inputs, torch.nan)
    with no_device_reads(host_side(batch)):
        step = builder.build(0, batch)
        assert step.wave is None
        assert step.tails
        run_open(stack, step.tails, inputs, outputs)
    if device.name == "cpu":
        assert outputs.isfinite().all()


def test_a_builder_that_read_the_block_table_would_be_noticed():
    batch = batch_of(MIXED, "V2", "cpu")
    with no_device_reads(host_side(batch)), pytest.raises(DeviceRead):
        batch.block_table_tensor.tolist()
