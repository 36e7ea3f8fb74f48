"""What vLLM's runner knows of our layers: their pages, and the builder that plans a step.

Both model runners call the builder once a step with the batch on the host. The plan is made from host
integers; the block table stays on the device and is only indexed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_armt.attention import Attention
from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation
from vllm_armt.core.pages import LayerPages, PageLayout
from vllm_armt.executor.tails import TailMetadata
from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.integration.options import Options
from vllm_armt.linear.grouped import has_grouped_mm
from vllm_armt.plan.step import Chunk, Schedule, plan_step
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
        attention: Attention,
        recurrence: Recurrence,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.needs_prompt_length = config.needs_prompt_length
        self.segmentation = lru_cache(maxsize=1 << 12)(config.segmentation)
        self.layout = config.segment_layout
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

    def step(self, chunks: Sequence[Chunk], block_table: Tensor | None) -> Step:
        """The step that computes `chunks`; `block_table` is int32 `[requests, segments]`, None without pages."""
        plan = plan_step(chunks, self.schedule)
        L, device = self.schedule.num_layers, self.device
        return Step(
            WaveMetadata.build(plan.wave, L, self.has_grouped_mm, block_table, device) if plan.wave else None,
            TailMetadata.build(plan.tails, self.layout, self.attention, self.recurrence, block_table, device)
            if plan.tails
            else None,
        )

    def dummy_step(self, num_tokens: int, max_documents: int, max_length: int) -> Step:
        """A step of so many tokens that touches no page: for memory profiling.

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
        return self.step(max(steps, key=self._memories), None)

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


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Turns vLLM's batch into a step (vllm/v1/attention/backend.py: AttentionMetadataBuilder)."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        assert isinstance(layer, PagedLayer)
        self.planner = layer.planner

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch = common_attn_metadata
        assert batch.seq_lens_cpu_upper_bound is not None
        rows = batch.query_start_loc_cpu.tolist()
        # an upper bound only under speculative decoding, which is refused
        ends = batch.seq_lens_cpu_upper_bound.tolist()
        prompts, segmentation = self._prompt_lengths(batch), self.planner.segmentation
        chunks = [
            Chunk(request, begin, ends[request] - (end - begin), ends[request], segmentation(prompts[request]))
            for request, (begin, end) in enumerate(pairwise(rows))
            if end > begin
        ]
        return self.planner.step(chunks, batch.block_table_tensor)

    def _prompt_lengths(self, batch: CommonAttentionMetadata) -> list[int]:
        """Tokens of each request's prompt; vLLM hands them out if the model asks for them (`hooks.py`)."""
        if not self.planner.needs_prompt_length:
            return [1] * batch.num_reqs
        assert batch.rswa_prefix_lens is not None
        return batch.rswa_prefix_lens.tolist()


class SegmentBackend(AttentionBackend):
    """The backend that vLLM finds for our layers; the model attends by itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "ARMT"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise TypeError("ARMT layers have no attention implementation of vLLM's; the model class attends by itself.")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder


class PagedLayer(nn.Module, AttentionLayerBase):
    """One layer's pages as vLLM sees them: asks for their size, is given the pool."""

    def __init__(self, layout: PageLayout, planner: Planner, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.layout = layout
        self.planner = planner
        self.prefix = prefix
        self.pages: LayerPages | None = None
        self.kv_cache: Any = torch.tensor([])
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SegmentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return SegmentSpec.create(self.layout.segment_size, self.layout.page_bytes)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pool: int8 `[pages, 1, 1, page_bytes]`, strided by vLLM's layout of layers and blocks."""
        self.kv_cache = kv_cache
        self.pages = LayerPages(self.layout, kv_cache.view(torch.int8).squeeze(2).squeeze(1))
