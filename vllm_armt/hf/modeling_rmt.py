"""RMT: memory that travels through the token stream and the top layer (RMT paper, arXiv 2207.06881)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_armt.config import RMTConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.modeling_recurrent import RecurrentForCausalLM


class RMTForCausalLM(RecurrentForCausalLM):
    """A recurrent memory transformer with a language-model head.

    The m memory rows stand before a segment's tokens, to be read, and again behind them, to be written.
    What the base model, its final norm included, makes of the latter is the memory of the next segment.
    `memory` `[m, d]` is that of the first.
    """

    config_class = RMTConfig

    def _add_memory(self, dtype: torch.dtype) -> None:
        self.memory = self._memory_tokens(dtype)

    def _initial_state(self, batch_size: int) -> RecurrentCache:
        return RecurrentCache(batch_size, memory={len(self._layers) - 1: self.memory.expand(batch_size, -1, -1)})

    def _prefix_and_suffix(self, cache: RecurrentCache) -> tuple[Tensor, Tensor]:
        (memory,) = cache.memory.values()
        return memory, memory

    def _finish(self, suffix: Tensor, cache: RecurrentCache) -> None:
        cache.memory[len(self._layers) - 1] = suffix
