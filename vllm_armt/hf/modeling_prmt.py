"""PRMT: an RMT in which every layer carries a memory of its own, so that layers need not wait for the top."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_armt.config import PRMTConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.layer import RecurrentLayer
from vllm_armt.hf.modeling_recurrent import RecurrentForCausalLM


class PRMTLayer(RecurrentLayer):
    """A base model's decoder layer that finds its memory in the first and the last m rows of a segment.

    Its output at the last m is the memory that the layer finds in the next segment. Where the released
    code is followed (`config.aliased`), only the top layer's is: there the layer above writes its own
    memory over that output before it is kept, and so a layer finds what the layer above has found.
    """

    def __init__(self, layer: nn.Module, layer_idx: int, config: PRMTConfig, memory_dtype: torch.dtype):
        super().__init__(layer, layer_idx)
        d, layers = config.base_model_config.hidden_size, config.base_model_config.num_hidden_layers
        self.takes_from_above = config.aliased and layer_idx + 1 < layers
        self.memory = nn.Parameter(torch.empty(1, config.num_mem_tokens, d, dtype=memory_dtype))

    def enter(self, hidden_states: Tensor) -> Tensor:
        """Put the layer's memory in place of whatever comes at its rows."""
        cache, prefix, suffix = self.call.cache, self.call.prefix, self.call.suffix
        memory = cache.memory[self.layer_idx].to(hidden_states.dtype)
        tokens = hidden_states[:, prefix : hidden_states.shape[1] - suffix]
        return torch.cat([memory[:, :prefix], tokens, memory[:, :suffix]], dim=1)

    def leave(self, hidden_states: Tensor) -> None:
        """Keep what the next segment finds, if this one closes."""
        cache = self.call.cache
        if self.call.suffix:
            # the layer above has not run yet: what it has there is what it found
            above = cache.memory[self.layer_idx + 1] if self.takes_from_above else None
            cache.memory[self.layer_idx] = hidden_states[:, -self.call.suffix :] if above is None else above


class PRMTForCausalLM(RecurrentForCausalLM):
    """A parallel recurrent memory transformer with a language-model head; see `PRMTLayer`."""

    config_class = PRMTConfig
    _no_split_modules = ["PRMTLayer"]  # noqa: RUF012

    def _add_memory(self, dtype: torch.dtype) -> None:
        for i, layer in enumerate(self._layers):
            self._layers[i] = PRMTLayer(layer, i, self.config, memory_dtype=dtype)

    def _initial_state(self, batch_size: int) -> RecurrentCache:
        memory = [memory.expand(batch_size, -1, -1) for memory in self._memories()]
        return RecurrentCache(batch_size, memory=dict(enumerate(memory)))

    def _prefix_and_suffix(self, cache: RecurrentCache) -> tuple[Tensor, Tensor]:
        # the layers put their own in place of it
        rows = self._memories()[0][0]
        return rows, rows
