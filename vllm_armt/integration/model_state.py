"""What vLLM's model runner V2 knows on the host and a step is planned from: prompt lengths, and who needs all outputs.

Where a request's segments lie may depend on its prompt's length, and a step is planned on the host. Model
runner V1 hands over a host tensor (see `hooks.RecurrentArchConvertor.rswa_window`); V2 plans with a copy on the
device. There a model class names its model state, and this one puts a host tensor in the same place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_armt.integration.builder import needs_all_outputs


class PlanningState(DefaultModelState):
    """vLLM's default state; `rswa_prefix_lens` of the metadata is int32 `[requests]` on the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # a batch that vLLM makes up to warm up has no requests: any length will do that a prompt can have
        self._prompt_lens = np.ones(self.max_num_reqs, dtype=np.int32)
        self._all_outputs = np.ones(self.max_num_reqs, dtype=bool)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Note a request that starts, or resumes, in slot `req_index`."""
        super().add_request(req_index, new_req_data)
        self._prompt_lens[req_index] = new_req_data.prompt_len
        self._all_outputs[req_index] = needs_all_outputs(new_req_data.sampling_params)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Build the step's metadata, with the lengths of the batch's prompts."""
        slots = input_batch.idx_mapping_np
        self.model.planner.all_outputs = bool(self._all_outputs[slots].any())
        prompt_lens = torch.from_numpy(self._prompt_lens[slots])
        return super().prepare_attn(replace(input_batch, prompt_lens=prompt_lens), *args, **kwargs)
