"""What vLLM's runner knows of our layers: their pages, and the builder that plans a step.

Both model runners call the builder once a step with the batch on the host. The plan is made from host
integers; the block table stays on the device and is only indexed there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_armt.core.pages import LayerPages, PageLayout
from vllm_armt.executor.step import Planner, Step
from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.integration.capacity import announce
from vllm_armt.plan.step import Chunk


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Turns vLLM's batch into a step (vllm/v1/attention/backend.py: AttentionMetadataBuilder)."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        assert isinstance(layer, PagedLayer)
        self.layer, self.planner = layer, layer.planner
        announce(vllm_config, self.planner.attention.name)

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
        return self.planner.step(chunks, batch.block_table_tensor, self.layer.pages)

    def _prompt_lengths(self, batch: CommonAttentionMetadata) -> list[int]:
        """Tokens of each request's prompt; vLLM hands them out if the model asks for them (`hooks.py`)."""
        if not self.planner.needs_prompt_length:
            return [1] * batch.num_reqs
        assert batch.rswa_prefix_lens is not None
        return batch.rswa_prefix_lens.tolist()


def needs_all_outputs(params: SamplingParams | None) -> bool:
    """Whether a request is answered from the outputs of all its prompt's tokens, and not just of the last one."""
    # not every vLLM that is supported has the second
    return params is None or any(
        getattr(params, name, None) is not None for name in ("prompt_logprobs", "prompt_logprob_token_ids")
    )


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
