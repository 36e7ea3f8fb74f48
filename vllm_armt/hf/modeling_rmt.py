"""RMT and PRMT: memory that travels through the token stream (RMT paper, arXiv 2207.06881).

In an RMT the top layer hands it to the next segment. In a PRMT every layer carries a memory of its own, so that layers
need not wait for the top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_armt.config import PRMTConfig, RMTConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.modeling_recurrent import RecurrentForCausalLM, RecurrentLayer, rows_of


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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run one cell.

        Args:
            hidden_states: `[B, rows, d]`, the rows of `call`; those of the memory are replaced.
            args, kwargs: what the base model hands to its layers.

        Returns:
            What the base model's layer does.
        """
        cache, i, prefix, suffix = self.call.cache, self.layer_idx, self.call.prefix, self.call.suffix
        memory = cache.memory[i].to(hidden_states.dtype)
        tokens = hidden_states[:, prefix : hidden_states.shape[1] - suffix]
        rows = torch.cat([memory[:, :prefix], tokens, memory[:, :suffix]], dim=1)
        output = self.layer(rows, *args, **kwargs)
        if suffix > 0:
            # the layer above has not run yet: what it has there is what it found
            cache.memory[i] = cache.memory[i + 1] if self.takes_from_above else rows_of(output)[:, -suffix:]
        return output


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
