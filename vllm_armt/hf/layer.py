"""One decoder layer with its associative memory (ARMT paper, arXiv 2407.04841, section 3)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, dtype, nn
from transformers import initialization as init

from vllm_armt.config import ARMTConfig
from vllm_armt.hf.cache import ARMTCache


class ARMTLayer(nn.Module):
    """A base model's decoder layer that reads its memory before it runs and writes it afterwards.

    A layer that `config.wrap_layers` leaves out has no memory and only runs.
    """

    def __init__(self, layer: nn.Module, config: ARMTConfig, layer_idx: int, memory_dtype: dtype):
        super().__init__()
        self.layer = layer
        self.layer_idx = layer_idx
        self.rule = config.memory_rule
        self.has_memory = config.has_memory[layer_idx]
        if self.has_memory:
            d, p = config.base_model_config.hidden_size, config.d_mem
            self.W_mq = nn.Linear(d, p, bias=False, dtype=memory_dtype)
            self.W_mk = nn.Linear(d, p, bias=False, dtype=memory_dtype)
            self.W_mv = nn.Linear(d, d, bias=False, dtype=memory_dtype)
            self.W_mb = nn.Linear(d, 1, dtype=memory_dtype)

    def reset_memory(self) -> None:
        """Draw the projections as the authors do; with W_mv = 0 nothing is ever written to M."""
        if self.has_memory:
            for linear in (self.W_mq, self.W_mk, self.W_mb):
                init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            init.zeros_(self.W_mb.bias)
            init.zeros_(self.W_mv.weight)

    def forward(self, hidden_states: Tensor, *, cache: ARMTCache, num_writes: int, **kwargs: Any) -> Tensor:
        """Run one cell.

        Args:
            hidden_states: `[B, n + num_writes, d]`, rows of one segment, its memory tokens last.
            cache: its M and z of this layer are read, and replaced if the segment closes.
            num_writes: m if the segment closes here, else 0.
            **kwargs: what the base model hands to its layers.
        """
        if self.has_memory and cache.segments > 0:
            hidden_states = hidden_states + self._read(hidden_states, cache)
        output = self.layer(hidden_states, **kwargs)
        if self.has_memory and num_writes > 0:
            self._write(output[:, -num_writes:], cache)
        return output

    def _read(self, h: Tensor, cache: ARMTCache) -> Tensor:
        M, z = cache.M[self.layer_idx], cache.z[self.layer_idx]
        q = self.rule.phi(self.W_mq(h.to(self.W_mq.weight.dtype)).to(M.dtype))
        return self.rule.read(q, M, z).to(h.dtype)

    def _write(self, o: Tensor, cache: ARMTCache) -> None:
        M, z = cache.M[self.layer_idx], cache.z[self.layer_idx]
        o = o.to(self.W_mk.weight.dtype)
        k = self.rule.phi(self.W_mk(o).to(M.dtype))
        v = self.W_mv(o).to(M.dtype)
        beta = self.W_mb(o).to(M.dtype).sigmoid()
        residual, dz = self.rule.update(k, v, beta, k @ M, z, first=cache.segments == 0)
        cache.M[self.layer_idx] = M + k.mT @ residual
        cache.z[self.layer_idx] = z + dz
