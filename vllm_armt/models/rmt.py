"""The systems whose memory travels in the token stream as vLLM runs them: RMT, and PRMT with a memory per layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vllm_armt.config import PRMTConfig, RMTConfig
from vllm_armt.models.recurrent import RecurrentForCausalLM, Slots
from vllm_armt.recurrence.prmt import LayerMemory
from vllm_armt.recurrence.rmt import TopMemory


class RMTForCausalLM(RecurrentForCausalLM):
    """A recurrent memory transformer; its decoder layers are the base model's own."""

    config: RMTConfig
    layer_prefix = ""

    def make_system(self, memory_dtype: torch.dtype) -> TopMemory | LayerMemory:
        base = self.config.base_model_config
        initial = torch.empty(self.cell.suffix, base.hidden_size, dtype=memory_dtype)
        return TopMemory(nn.Parameter(initial, requires_grad=False), base.num_hidden_layers, self.norm)

    def system_slots(self) -> Slots:
        assert isinstance(self.system, TopMemory)
        initial = self.system.initial
        return {"memory": (tuple(initial.shape), initial.data.copy_)}


class PRMTForCausalLM(RMTForCausalLM):
    """A parallel recurrent memory transformer: every layer carries a memory."""

    config: PRMTConfig
    layer_prefix = "layer."

    def make_system(self, memory_dtype: torch.dtype) -> LayerMemory:
        base = self.config.base_model_config
        initial = torch.empty(base.num_hidden_layers, self.cell.suffix, base.hidden_size, dtype=memory_dtype)
        return LayerMemory(nn.Parameter(initial, requires_grad=False), self.config.aliased)

    def system_slots(self) -> Slots:
        assert isinstance(self.system, LayerMemory)
        initial = self.system.initial.data
        return {
            f"{self.layer_name(i)}.memory": ((1, *initial.shape[1:]), partial(_load_memory, initial, i))
            for i in range(len(initial))
        }


def _load_memory(initial: Tensor, layer: int, tensor: Tensor) -> None:
    initial[layer] = tensor[0]
