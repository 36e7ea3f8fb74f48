"""What the hook sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    CompilationMode,
    VllmConfig,
)
from vllm.config.compilation import CUDAGraphMode

from tests.support.hook_configs import LIMITS, S, complete, wrapped
from vllm_armt.config import CONFIGS
from vllm_armt.integration.hooks import (
    MEMORY_SCHEDULER,
    SCHEDULER,
    RecurrentHook,
    logger,
)


@pytest.mark.parametrize(("alignment", "is_on"), [("left", True), ("right", False), ("center", False)])
def test_prefix_caching_is_off_where_segments_are_counted_from_the_prompts_end(
    vllm_config: VllmConfig, messages: list[str], alignment: str, is_on: bool
):
    vllm_config.model_config.hf_config = wrapped(CONFIGS[0], generation_policy="open", segment_alignment=alignment)
    RecurrentHook.verify_and_update_config(vllm_config)
    assert vllm_config.cache_config.enable_prefix_caching == is_on
    assert [message.startswith("Prefix caching is off") for message in messages] == [True] * (not is_on)


def test_the_hook_sets_what_an_armt_needs(completed: VllmConfig):
    assert completed.cache_config.block_size == S
    assert completed.scheduler_config.scheduler_cls == SCHEDULER
    assert completed.compilation_config.mode == CompilationMode.NONE
    assert completed.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def test_limits_that_fit_stay_as_they_are(completed: VllmConfig):
    assert completed.scheduler_config.max_num_seqs == 8
    assert completed.scheduler_config.max_num_batched_tokens == 64


def test_the_hook_may_run_again_over_its_own_result(vllm_config: VllmConfig):
    RecurrentHook.verify_and_update_config(vllm_config)
    assert vllm_config.cache_config.block_size == S
    assert vllm_config.scheduler_config.max_num_batched_tokens == 64


def test_a_block_size_that_is_the_segment_is_accepted(checkpoint: str):
    given = {"cache_config": CacheConfig(block_size=S)}
    assert complete(checkpoint, given=given, **LIMITS).cache_config.block_size == S


@pytest.fixture
def with_memories(vllm_config: VllmConfig, checkpoint: str, tmp_path: Path) -> VllmConfig:
    """A configuration that asks for memories, of a checkpoint with weights."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    save_file({"a": torch.ones(2)}, model / "model.safetensors")
    vllm_config.model_config.model = str(model)
    vllm_config.additional_config = {"armt": {"memories": str(tmp_path / "memories")}}
    return vllm_config


def test_memories_bring_a_connector_and_the_scheduler_that_goes_with_it(with_memories: VllmConfig, tmp_path: Path):
    for _ in range(2):
        # vLLM may run the hook again over its own result
        RecurrentHook.verify_and_update_config(with_memories)
        assert with_memories.scheduler_config.scheduler_cls == MEMORY_SCHEDULER
        transfer = with_memories.kv_transfer_config
        assert transfer is not None
        assert (transfer.kv_role, transfer.kv_load_failure_policy) == ("kv_producer", "fail")
        assert transfer.kv_connector_extra_config["model"]["identity"]["system"] == "armt"


def test_without_memories_there_is_no_connector(vllm_config: VllmConfig):
    RecurrentHook.verify_and_update_config(vllm_config)
    assert vllm_config.kv_transfer_config is None
    assert vllm_config.scheduler_config.scheduler_cls == SCHEDULER


def test_memories_of_models_that_can_have_none_are_refused(with_memories: VllmConfig, tmp_path: Path):
    hf_config = with_memories.model_config.hf_config
    for config, words in (
        (wrapped(CONFIGS[0], generation_policy="open", segment_alignment="right"), "not 'left'"),
        (wrapped(CONFIGS[0], "gpt2", learned_positions="grow"), "positions grow"),
    ):
        with_memories.model_config.hf_config = config
        with_memories.cache_config.block_size = config.segment_size
        with pytest.raises(ValueError, match=words):
            RecurrentHook.verify_and_update_config(with_memories)
    with_memories.model_config.hf_config = hf_config
    with_memories.cache_config.block_size = hf_config.segment_size
    (tmp_path / "memories").touch()
    with pytest.raises(ValueError, match="Memories can't be kept in"):
        RecurrentHook.verify_and_update_config(with_memories)


def test_too_small_a_budget_is_raised_to_a_segment_beside_the_decodes(checkpoint: str, messages: list[str]):
    scheduler = complete(checkpoint, max_num_seqs=8, max_num_batched_tokens=10).scheduler_config
    assert scheduler.max_num_batched_tokens == S + 8
    (message,) = messages
    assert message.startswith("max_num_batched_tokens is raised from 10 to 24: ")


def test_requests_are_limited_to_what_their_buffers_take(checkpoint: str, messages: list[str]):
    scheduler = complete(
        checkpoint, max_model_len=1 << 24, max_num_seqs=100, max_num_active_seqs=50, max_num_batched_tokens=256
    ).scheduler_config
    assert scheduler.max_num_seqs == scheduler.max_num_active_seqs == 16
    (message,) = messages
    assert message.startswith("max_num_seqs is lowered from 100 to 16: with max_model_len=16777216 ")


def test_what_stays_as_it_was_given_is_not_logged(checkpoint: str, messages: list[str]):
    eager = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE)
    for given in ({}, {"compilation_config": eager}):
        RecurrentHook.verify_and_update_config(complete(checkpoint, given=given, **LIMITS))
    assert messages == []


def test_a_threshold_on_prefill_chunks_becomes_whole_segments(vllm_config: VllmConfig, messages: list[str]):
    vllm_config.scheduler_config.long_prefill_token_threshold = 17
    RecurrentHook.verify_and_update_config(vllm_config)
    assert vllm_config.scheduler_config.long_prefill_token_threshold == 2 * S
    (message,) = messages
    assert message.startswith("long_prefill_token_threshold is raised from 17 to 32: ")


def test_a_limit_on_scheduled_tokens_is_kept_where_a_segment_fits(vllm_config: VllmConfig, messages: list[str]):
    scheduler = vllm_config.scheduler_config
    scheduler.max_num_scheduled_tokens = 10
    RecurrentHook.verify_and_update_config(vllm_config)
    assert scheduler.max_num_scheduled_tokens == S + scheduler.max_num_seqs
    (message,) = messages
    assert message.startswith("max_num_scheduled_tokens is raised from 10 to ")
    scheduler.max_num_scheduled_tokens = 50
    RecurrentHook.verify_and_update_config(vllm_config)
    assert scheduler.max_num_scheduled_tokens == 50


def test_the_log_is_seen_where_vllms_own_is():
    assert logger.name.startswith("vllm.")
