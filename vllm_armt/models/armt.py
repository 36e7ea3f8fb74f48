"""ARMT as vLLM runs it: an associative memory in every layer; and ARMT with a sliding window."""

from __future__ import annotations

import torch
from torch import nn

from vllm_armt.config import ARMTConfig
from vllm_armt.models.recurrent import RecurrentForCausalLM, WeightTargets
from vllm_armt.models.weights import WeightTarget
from vllm_armt.recurrence.armt import ARMTRecurrence
from vllm_armt.recurrence.armt_projections import MemoryProjections


class ARMTForCausalLM(RecurrentForCausalLM):
    """An associative recurrent memory transformer."""

    config: ARMTConfig

    def make_recurrence(self, memory_dtype: torch.dtype) -> ARMTRecurrence:
        config, base = self.config, self.config.base_model_config
        projections = MemoryProjections(
            base.num_hidden_layers, base.hidden_size, config.d_mem, config.beta_size, config.memory_rule, memory_dtype
        )
        rows = torch.empty(self.layout.prefix + self.layout.suffix, base.hidden_size, dtype=memory_dtype)
        return ARMTRecurrence(projections, nn.Parameter(rows, requires_grad=False), self.layout.suffix)

    def recurrence_targets(self) -> WeightTargets:
        recurrence = self.recurrence
        assert isinstance(recurrence, ARMTRecurrence)
        prefix, rows = self.layout.prefix, recurrence.rows_around.data
        targets: WeightTargets = {"memory": (tuple(rows[prefix:].shape), rows[prefix:].copy_)}
        if prefix:
            targets["sink"] = (tuple(rows[:prefix].shape), rows[:prefix].copy_)
        projections = recurrence.projections
        of_layer = WeightTarget.of_linear("", projections.read_projection) | WeightTarget.of_linear(
            "", projections.write_projection
        )
        # only W_mb has a bias; those of W_mk and W_mv stay zero
        of_layer = {name: target for name, target in of_layer.items() if name not in ("W_mk.bias", "W_mv.bias")}
        for i, has_memory in enumerate(self.config.has_memory):
            if has_memory:
                targets |= self.layer_targets(i, of_layer)
        return targets


class ARMTSlidingWindowForCausalLM(ARMTForCausalLM):
    """An ARMT whose attention reaches one window back into the segment before."""
