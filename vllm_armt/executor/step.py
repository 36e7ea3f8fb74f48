"""A step on the device: its plan, with all integers that the executors look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionMetadata

from vllm_armt.attention import LayerAttention
from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation
from vllm_armt.core.pages import LayerPages
from vllm_armt.executor.tails import TailMetadata
from vllm_armt.linear.grouped import has_grouped_mm
from vllm_armt.options import Options
from vllm_armt.plan.step import Chunk, Schedule, plan_step
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence import Recurrence

TARGET_ROWS = {"cpu": 2048, "cuda": 32768}
"""Rows of a grouped forward in bfloat16 that fill a device; more lanes or layers at a time gain nothing there.

Measured on 2 CPU cores (`vllm-armt bench schedule`), where more rows no longer fit the cache. The value for CUDA is an
estimate: with half of it "auto" swept 14 of a 1B model's 16 layers and then two, 5 % slower than all on an H200."""


def target_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of a grouped forward that fill a device: as many bytes in every dtype."""
    return TARGET_ROWS.get(device.type, TARGET_ROWS["cuda"]) * torch.bfloat16.itemsize // dtype.itemsize


@dataclass(frozen=True)
class Step(AttentionMetadata):
    """A planned step, on the device: first the wave, then the tails; None where there is nothing to do."""

    wave: WaveMetadata | None
    tails: TailMetadata | None


class Planner:
    """Makes steps of one model."""

    def __init__(
        self,
        config: RecurrentConfig,
        options: Options,
        attention: LayerAttention,
        recurrence: Recurrence[Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.needs_prompt_length = config.needs_prompt_length
        self.segmentation = lru_cache(maxsize=1 << 12)(config.segmentation)
        self.layout = config.segment_layout
        self.moves_keys = config.window_shift > 0
        self.attention = attention
        self.recurrence = recurrence
        self.device = device
        self.schedule = Schedule(
            options.schedule,
            options.target_rows or target_rows(device, dtype),
            config.base_model_config.num_hidden_layers,
            self.layout.tokens,
            self.layout.rows,
            recurrence.flow,
        )
        self.has_grouped_mm = has_grouped_mm(device)
        self.all_outputs = True
        """Whether the steps to come need every token's output; a runner that knows better says so before each."""

    def step(self, chunks: Sequence[Chunk], block_table: Tensor | None, pages: LayerPages | None) -> Step:
        """The step that computes `chunks`.

        Args:
            chunks: of all requests, in the order of their rows.
            block_table: int32 `[requests, segments]` on the device; None where there are no pages.
            pages: those of any layer, as all lie alike; None where there are none.
        """
        plan = plan_step(chunks, self.schedule)
        wave = tails = None
        if plan.wave:
            wave = WaveMetadata.build(
                plan.wave,
                self.schedule.num_layers,
                self.has_grouped_mm,
                block_table,
                self.device,
                self.all_outputs,
            )
        if plan.tails:
            rows = TailRows(plan.tails, self.layout, block_table, self.device)
            tails = TailMetadata.build(rows, self.attention, self.recurrence, pages, self.moves_keys)
        return Step(wave, tails)

    def dummy_step(self, num_tokens: int, max_documents: int, max_length: int) -> Step:
        """A step of `num_tokens` tokens that touches no page: for vLLM's profile run.

        Of the numbers of documents that can share such a step it takes the one whose lanes hold most memories.

        Args:
            num_tokens: of the step.
            max_documents: that share a step.
            max_length: tokens of a document.
        """
        segments = num_tokens // self.layout.tokens
        fewest = cdiv(segments, max(max_length // self.layout.tokens, 1))
        most = max(min(max_documents, segments), fewest)
        whole = Segmentation(self.layout.tokens)
        steps = (_whole_documents(num_tokens, number, whole) for number in range(fewest, most + 1))
        return self.step(max(steps, key=self._memories), None, None)

    def _memories(self, chunks: Sequence[Chunk]) -> int:
        """How many memories are held at a time while `chunks` are computed."""
        wave = plan_step(chunks, self.schedule).wave
        return len(wave.lanes) * wave.depth if wave else 0


def _whole_documents(num_tokens: int, number: int, segmentation: Segmentation) -> list[Chunk]:
    """Documents of whole segments, as equal as can be, and one with the tokens that are left over."""
    S = segmentation.size
    share, more = divmod(num_tokens // S, max(number, 1))
    lengths = [S * (share + (i < more)) for i in range(number)]
    chunks, row = [], 0
    for request, length in enumerate([*lengths, num_tokens % S]):
        if length:
            chunks.append(Chunk(request, row, 0, length, segmentation))
            row += length
    return chunks
