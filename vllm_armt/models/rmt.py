"""The recurrences whose memory travels in the token stream as vLLM runs them: RMT, and PRMT with a memory per layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vllm_armt.config import PRMTConfig, RMTConfig
from vllm_armt.models.recurrent import RecurrentForCausalLM, WeightTargets
from vllm_armt.recurrence.prmt import PRMTRecurrence
from vllm_armt.recurrence.rmt import RMTRecurrence


class RMTForCausalLM(RecurrentForCausalLM):
    """A recurrent memory transformer; its decoder layers are the base model's own."""

    config: RMTConfig
    layer_prefix = ""

    def make_recurrence(self, memory_dtype: torch.dtype) -> RMTRecurrence | PRMTRecurrence:
        base = self.config.base_model_config
        initial = torch.empty(self.layout.suffix, base.hidden_size, dtype=memory_dtype)
        return RMTRecurrence(nn.Parameter(initial, requires_grad=False), base.num_hidden_layers, self.norm)

    def recurrence_targets(self) -> WeightTargets:
        assert isinstance(self.recurrence, RMTRecurrence)
        initial = self.recurrence.initial
        return {"memory": (tuple(initial.shape), initial.data.copy_)}


class PRMTForCausalLM(RMTForCausalLM):
    """A parallel recurrent memory transformer: every layer carries a memory."""

    config: PRMTConfig
    layer_prefix = "layer."

    def make_recurrence(self, memory_dtype: torch.dtype) -> PRMTRecurrence:
        base = self.config.base_model_config
        initial = torch.empty(base.num_hidden_layers, self.layout.suffix, base.hidden_size, dtype=memory_dtype)
        return PRMTRecurrence(nn.Parameter(initial, requires_grad=False), self.config.aliased)

    def recurrence_targets(self) -> WeightTargets:
        assert isinstance(self.recurrence, PRMTRecurrence)
        initial = self.recurrence.initial.data
        return {
            f"{self.layer_name(i)}.memory": ((1, *initial.shape[1:]), partial(_load_memory, initial, i))
            for i in range(len(initial))
        }


def _load_memory(initial: Tensor, layer: int, tensor: Tensor) -> None:
    initial[layer] = tensor[0]
