"""Prompt lengths for model runner V2, on vLLM's own classes; the runner itself needs a GPU and is not run here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import default, resolve_model_state_cls

from tests.support.simulation import vllm_config
from vllm_armt.integration.builder import needs_all_outputs
from vllm_armt.integration.model_state import PlanningState

CPU = torch.device("cpu")


@pytest.fixture
def state() -> PlanningState:
    model: Any = torch.nn.Module()
    model.planner = SimpleNamespace(all_outputs=None)
    return PlanningState(vllm_config(slots=4, budget=64), model, None, CPU)


def start(state: PlanningState, slot: int, prompt: int, generated: int = 0, **params: Any) -> None:
    tokens = list(range(prompt + generated))
    state.add_request(
        slot,
        NewRequestData(
            req_id=f"r{slot}",
            prompt_token_ids=tokens[:prompt],
            prefill_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(**params),
            pooling_params=None,
            block_ids=([1],),
            num_computed_tokens=0,
            lora_request=None,
        ),
    )


def batch_of(slots: list[int]) -> InputBatch:
    batch = InputBatch.make_dummy(len(slots), len(slots), InputBuffers(4, 64, CPU))
    batch.idx_mapping_np = np.array(slots, dtype=np.intp)
    return batch


class Builder:
    """Keeps what a metadata builder would be given."""

    supports_update_block_table = False

    def get_metadata_builder(self, ubatch: int) -> Builder:
        return self

    def build_metadata(self, metadata: CommonAttentionMetadata, ubatch: int) -> CommonAttentionMetadata:
        return metadata

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """In vLLM 0.31 the builder is asked, in later ones its group."""
        return common_attn_metadata

    layer_names = ("layer",)
    kv_cache_spec = None


def prompt_lens(state: PlanningState, slots: list[int]) -> torch.Tensor:
    """What vLLM's own `prepare_attn` hands to a builder."""
    n = len(slots)
    metadata = state.prepare_attn(
        batch_of(slots),
        CUDAGraphMode.NONE,
        block_tables=(torch.zeros(n, 8, dtype=torch.int32),),
        slot_mappings=torch.zeros(1, n, dtype=torch.int64),
        attn_groups=[[Builder()]],
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
    )
    return metadata["layer"].rswa_prefix_lens


def test_a_builder_is_given_the_prompts_lengths_in_the_order_of_the_batch(state):
    start(state, slot=2, prompt=9)
    start(state, slot=0, prompt=5, generated=30)
    lens = prompt_lens(state, [0, 2])
    assert lens.tolist() == [5, 9]
    assert lens.device == CPU


def test_a_slot_that_is_taken_again_has_the_new_length(state):
    start(state, slot=1, prompt=9)
    lens = prompt_lens(state, [1])
    start(state, slot=1, prompt=7)
    assert prompt_lens(state, [1]).tolist() == [7]
    assert lens.tolist() == [9], "a step in flight keeps its own"


def test_a_batch_without_requests_has_lengths_that_a_prompt_can_have(state):
    assert prompt_lens(state, [0, 1, 3]).tolist() == [1, 1, 1]


def test_all_outputs_are_computed_while_a_request_of_the_batch_asks_for_them(state):
    start(state, slot=2, prompt=9, logprobs=3)
    start(state, slot=0, prompt=9, prompt_logprobs=0)
    found = []
    for slots in ([0], [2], [2, 0]):
        prompt_lens(state, slots)
        found.append(state.model.planner.all_outputs)
    assert found == [True, False, True]
    assert needs_all_outputs(cast(SamplingParams, SimpleNamespace(prompt_logprob_token_ids=[[1]])))
    assert needs_all_outputs(None)


def test_vllm_takes_the_state_that_the_model_names():
    model = SimpleNamespace(get_model_state_cls=lambda: PlanningState)
    assert resolve_model_state_cls(vllm_config(slots=4, budget=64), model) is PlanningState


def test_vllm_hands_on_the_batchs_prompt_lengths():
    """If this fails, read vllm/v1/worker/gpu again: model_runner.add_requests and model_states/default.prepare_attn."""
    assert "rswa_prefix_lens=input_batch.prompt_lens" in inspect.getsource(default.DefaultModelState.prepare_attn)
