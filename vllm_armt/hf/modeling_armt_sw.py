"""ARMT with a sliding window: attention reaches one window back, into the segment before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask

from vllm_armt.config import ARMTSWConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.modeling_armt import ARMTForCausalLM


class ARMTSlidingWindowForCausalLM(ARMTForCausalLM):
    """An ARMT whose rows also attend to keys of the segment before, as they were rotated there.

    Token i sees the window from key i on (S + 1 tokens with its own segment's), the memory tokens see all
    of it, and the sink sees none. `sink` `[1, d]`, where the configuration has one, is the embedding of a
    row that begins every segment.
    """

    config_class = ARMTSWConfig

    def reset_memory(self) -> None:
        super().reset_memory()
        if self.config.use_sink:
            init.normal_(self.sink, std=0.02)

    def _add_memory(self, dtype: torch.dtype) -> None:
        super()._add_memory(dtype)
        if self.config.use_sink:
            self.sink = nn.Parameter(torch.empty(1, self.config.base_model_config.hidden_size, dtype=dtype))

    def _prefix_and_suffix(self, cache: RecurrentCache) -> tuple[Tensor, Tensor]:
        return self.sink if self.config.use_sink else self.memory[:0], self.memory

    def _mask(self, rows: Tensor, cache: RecurrentCache, n: int) -> Tensor:
        window = cache.window_size
        if window == 0:
            return super()._mask(rows, cache, n)
        first, tokens = window + self.config.prefix_rows, cache.open_tokens + n

        def is_visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            token = row - first
            return (key >= window) | ((token >= 0) & (key >= token)) | (token >= tokens)

        return create_causal_mask(
            self.model.config, rows, attention_mask=None, past_key_values=cache.kv, and_mask_function=is_visible
        )
