"""SegmentSpec: what vLLM is told about the cache of one layer: fixed-size pages, one per segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_armt.core.pages import ALIGNMENT

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGES_READ = 1
PAGES_WRITTEN = 2
"""A step reads the memory before its first token and writes the pages of `Segmentation.retained`: two, and one more
for every S tokens that a segment which never closes holds beyond its first S."""


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(AttentionSpec):
    """Cache of one layer, in pages of opaque bytes: block s of a request belongs to its segment s.

    While the segment is open its page holds the segment's KV; once it is closed, the memory after it. A
    segment that never closes goes on in the blocks behind its own.
    An `AttentionSpec` because vLLM lays out per-layer views only for attention and Mamba specs; a page
    is one "state" of `[1, 1, page_size_bytes]` int8 that the layer views as what it holds.
    """

    @classmethod
    def create(cls, segment_size: int, page_size_bytes: int) -> Self:
        """The spec of a layer with segments of `segment_size` tokens.

        Raises:
            ValueError: `page_size_bytes` is not a positive multiple of `pages.ALIGNMENT`.
        """
        if page_size_bytes <= 0 or page_size_bytes % ALIGNMENT:
            raise ValueError(
                f"A cache page of {page_size_bytes} bytes was asked for; pages are whole multiples of "
                f"{ALIGNMENT} bytes. Round the size up."
            )
        return cls(
            block_size=segment_size,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.int8,
            num_head_slots=1,
            tokens_per_state=segment_size,
            state_content_bytes=page_size_bytes,
            dcp_sharded=False,
        )

    @property
    def uses_slot_mapping(self) -> bool:
        """Tokens are addressed by their segment's page, not by slot."""
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        """No kernel reads the block table in tiles."""
        return None

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Columns of the worker's block table for `max_len` tokens.

        One more than they fill if segments are not counted from the first token: those before the prompt's
        last may be shorter than S.
        """
        is_left = vllm_config.model_config.hf_config.segment_alignment == "left"
        return super().max_num_blocks_per_req(vllm_config, max_len) + (not is_left)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The pages that any request can hold at a time, in bytes; its length does not matter.

        vLLM frees a page when the step that read it last has been processed, so with overlapping steps
        (async scheduling) each step in flight holds the pages it wrote. A segment that never closes may
        come to hold more pages where there are more; the scheduler ends its request where there are not.
        """
        segments = cdiv(vllm_config.model_config.max_model_len, self.block_size)
        pages = PAGES_READ + PAGES_WRITTEN * vllm_config.max_concurrent_batches
        return min(segments, pages) * self.page_size_bytes
