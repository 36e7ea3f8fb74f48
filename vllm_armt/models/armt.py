"""ARMT as vLLM runs it: an associative memory in every layer; and ARMT with a sliding window."""

from __future__ import annotations

import torch
from torch import nn

from vllm_armt.config import ARMTConfig
from vllm_armt.models.recurrent import RecurrentForCausalLM, Slots
from vllm_armt.models.weights import Slot
from vllm_armt.recurrence.armt import AssociativeMemory
from vllm_armt.recurrence.projections import StackedMemory


class ARMTForCausalLM(RecurrentForCausalLM):
    """An associative recurrent memory transformer."""

    config: ARMTConfig

    def make_system(self, memory_dtype: torch.dtype) -> AssociativeMemory:
        config, base = self.config, self.config.base_model_config
        projections = StackedMemory(
            base.num_hidden_layers, base.hidden_size, config.d_mem, config.beta_size, config.memory_rule, memory_dtype
        )
        rows = torch.empty(self.cell.prefix + self.cell.suffix, base.hidden_size, dtype=memory_dtype)
        return AssociativeMemory(projections, nn.Parameter(rows, requires_grad=False), self.cell.suffix)

    def system_slots(self) -> Slots:
        system = self.system
        assert isinstance(system, AssociativeMemory)
        prefix, rows = self.cell.prefix, system.rows_around.data
        slots: Slots = {"memory": (tuple(rows[prefix:].shape), rows[prefix:].copy_)}
        if prefix:
            slots["sink"] = (tuple(rows[:prefix].shape), rows[:prefix].copy_)
        projections = system.projections
        of_layer = Slot.of_linear("", projections.read_projection) | Slot.of_linear("", projections.write_projection)
        # only W_mb has a bias; those of W_mk and W_mv stay zero
        of_layer = {name: slot for name, slot in of_layer.items() if name not in ("W_mk.bias", "W_mv.bias")}
        for i, has_memory in enumerate(self.config.has_memory):
            if has_memory:
                slots |= self.layer_slots(i, of_layer)
        return slots


class ARMTSlidingWindowForCausalLM(ARMTForCausalLM):
    """An ARMT whose attention reaches one window back into the segment before."""
