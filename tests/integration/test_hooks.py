"""What vLLM derives from a config.json of ours, what the hook sets, and what it refuses."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    CompilationMode,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.config.attention import AttentionConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.kv_events import KVEventsConfig
from vllm.platforms.interface import Platform, PlatformEnum

from tests.support.golden_cases import HF
from vllm_armt import register
from vllm_armt.config import CONFIGS, RecurrentConfig
from vllm_armt.integration import hooks
from vllm_armt.integration.hooks import (
    MEMORY_SCHEDULER,
    SCHEDULER,
    RecurrentArchConvertor,
    RecurrentHook,
    logger,
    refuse_unsupported,
)

S = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the config.json of a golden, and no weights."""
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(HF[0].path / "config.json", directory)
    register()
    return str(directory)


def model_config(checkpoint: str, **fields: Any) -> ModelConfig:
    return ModelConfig(model=checkpoint, tokenizer=checkpoint, skip_tokenizer_init=True, **fields)


LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}


def complete(
    checkpoint: str, *, max_model_len: int | None = None, given: dict[str, Any] | None = None, **limits: Any
) -> VllmConfig:
    """The configuration that vLLM makes for the checkpoint, the hook included."""
    model = model_config(checkpoint, dtype="float32", max_model_len=max_model_len)
    scheduler = SchedulerConfig(max_model_len=model.max_model_len, is_encoder_decoder=False, **limits)
    return VllmConfig(model_config=model, scheduler_config=scheduler, **(given or {}))


@pytest.fixture(scope="module")
def completed(checkpoint: str) -> VllmConfig:
    return complete(checkpoint, **LIMITS)


@pytest.fixture
def vllm_config(completed: VllmConfig) -> VllmConfig:
    """A copy whose parts a test may change."""
    config = copy.copy(completed)
    for part in ("model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config"):
        setattr(config, part, copy.copy(getattr(config, part)))
    config.offload_config = copy.deepcopy(config.offload_config)
    return config


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the hook logs; vLLM's loggers hand nothing on to the root, where pytest listens."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_length_is_a_million_tokens_by_default_whatever_the_base_model_says(checkpoint: str):
    config = model_config(checkpoint)
    assert config.hf_text_config.max_position_embeddings == 1024
    assert config.max_model_len == 1_048_576


@pytest.mark.parametrize("max_model_len", [64, 1 << 22])
def test_another_length_may_be_asked_for_shorter_or_longer(checkpoint: str, max_model_len: int):
    assert model_config(checkpoint, max_model_len=max_model_len).max_model_len == max_model_len


def test_sizes_are_the_base_models(checkpoint: str):
    config = model_config(checkpoint)
    assert (config.get_vocab_size(), config.get_hidden_size()) == (192, 64)


BASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "max_position_embeddings": 1024},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024},
    "gpt2": {"n_positions": 1024},
    "gpt_neox": {"max_position_embeddings": 1024},
}


def wrapped(config_class: type[RecurrentConfig], base: str = "llama", **fields: Any) -> RecurrentConfig:
    """A configuration around a small base model."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    memory = {"d_mem": 8} if "d_mem" in config_class.required else {}
    return config_class(
        base_model_config={"model_type": base, **sizes, **BASES[base]},
        segment_size=S,
        num_mem_tokens=4,
        **memory,
        **fields,
    )


def derived(config: RecurrentConfig) -> Any:
    return RecurrentArchConvertor(config, config.get_text_config()).convert()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.model_type)
def test_vllm_derives_the_same_of_every_system_and_backbone(config_class: type[RecurrentConfig], base: str):
    arch = derived(wrapped(config_class, base, learned_positions="restart"))
    assert (arch.model_type, arch.text_model_type) == (config_class.model_type, base)
    assert (arch.vocab_size, arch.hidden_size, arch.total_num_hidden_layers) == (96, 64, 3)
    assert (arch.total_num_attention_heads, arch.head_size) == (4, 16)
    assert arch.derived_max_model_len_and_key == (1 << 20, "max_context")


def test_learned_positions_that_grow_bound_the_length():
    config = wrapped(CONFIGS[0], "gpt2", learned_positions="grow")
    # 51 segments of 16 tokens and 4 memory tokens, and 4 tokens more
    assert derived(config).derived_max_model_len_and_key == (820, "learned positions of the base model")
    assert config.get_text_config().model_max_length == 820
    config = wrapped(CONFIGS[0], "gpt2", learned_positions="grow", max_context=64)
    assert derived(config).derived_max_model_len_and_key == (64, "max_context")


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_vllm_hands_out_prompt_lengths_where_segments_depend_on_them(alignment: str):
    config = wrapped(CONFIGS[0], generation_policy="open", segment_alignment=alignment)
    assert derived(config).rswa_window == S
    assert derived(wrapped(CONFIGS[0])).rswa_window is None


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


REFUSED = {
    "speculative decoding (--speculative-config)": ("speculative_config", object()),
    "LoRA adapters at run time (--enable-lora)": ("lora_config", object()),
    "quantisation (--quantization)": ("model_config.quantization", "fp8"),
    "pipeline parallelism (--pipeline-parallel-size)": ("parallel_config.pipeline_parallel_size", 2),
    "context parallelism (--decode-context-parallel-size)": ("parallel_config.decode_context_parallel_size", 2),
    "context parallelism (--prefill-context-parallel-size)": ("parallel_config.prefill_context_parallel_size", 2),
    "dual batch overlap (--enable-dbo, --ubatch-size)": ("parallel_config.enable_dbo", True),
    "sleep mode (--enable-sleep-mode)": ("model_config.enable_sleep_mode", True),
    "KV cache events (--kv-events-config)": ("kv_events_config", KVEventsConfig(enable_kv_cache_events=True)),
    "KV connectors (--kv-transfer-config)": (
        "kv_transfer_config",
        KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
    ),
    "KV offloading (--kv-offloading-size)": ("cache_config.kv_offloading_size", 1.0),
    "weights off the device (--cpu-offload-gb)": ("offload_config.uva.cpu_offload_gb", 1.0),
    "weights off the device (--offload-group-size)": ("offload_config.prefetch.offload_group_size", 2),
    "--kv-cache-dtype fp8": ("cache_config.cache_dtype", "fp8"),
    "--block-size 32 (a block is a segment)": ("cache_config.block_size", 32),
    "prefill in one piece (--no-enable-chunked-prefill)": ("scheduler_config.enable_chunked_prefill", False),
    "a scheduler of one's own (--scheduler-cls)": ("scheduler_config.scheduler_cls", "my.Scheduler"),
    "prompt embeddings (--enable-prompt-embeds)": ("model_config.enable_prompt_embeds", True),
    "--runner pooling": ("model_config.runner_type", "pooling"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_unsupported_option_is_refused_by_name(vllm_config: VllmConfig, option: str):
    refuse_unsupported(vllm_config)
    path, value = REFUSED[option]
    *parts, name = path.split(".")
    setattr(reduce(getattr, parts, vllm_config), name, value)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        refuse_unsupported(vllm_config)
    assert str(error.value) == f"A model of type 'armt' can't be served with {option}: not supported. Start without it."


@pytest.mark.parametrize(("platform", "is_known"), [("cuda", True), ("cpu", True), ("rocm", False), ("xpu", False)])
def test_a_platform_that_was_never_tried_is_refused_by_name(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, platform: str, is_known: bool
):
    class Found(Platform):
        _enum = PlatformEnum[platform.upper()]
        device_name = platform

    monkeypatch.setattr(hooks, "current_platform", Found())
    if is_known:
        RecurrentHook.verify_and_update_config(vllm_config)
    else:
        with pytest.raises(ValueError, match=f"vLLM found '{platform}'"):
            RecurrentHook.verify_and_update_config(vllm_config)


EAGER = "The model is not compiled, and on a GPU it records CUDA graphs of its own (none with --enforce-eager)."
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"optimization_level": 3}, f"Without effect: --optimization-level. {EAGER}"),
    (
        {"compilation_config": CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL)},
        f"Without effect: --compilation-config mode, --compilation-config cudagraph_mode. {EAGER}",
    ),
    (
        {"compilation_config": CompilationConfig(cudagraph_capture_sizes=[1, 2], max_cudagraph_capture_size=2)},
        f"Without effect: --cudagraph-capture-sizes, --max-cudagraph-capture-size. {EAGER}",
    ),
    (
        {"attention_config": AttentionConfig(backend="FLASH_ATTN")},
        "Without effect: --attention-backend FLASH_ATTN. How the model attends is chosen with --additional-config "
        '\'{"armt": {"attention": "..."}}\': auto, flash_attn, sdpa, vllm_cpu, xformers.',
    ),
]


@pytest.mark.parametrize(("given", "warning"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_named(checkpoint: str, messages: list[str], given: dict[str, Any], warning: str):
    config = complete(checkpoint, given=copy.deepcopy(given), **LIMITS)
    assert messages == [warning]
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"correction": "false"}, "`correction` is 'false'; it must be true or false"),
        ({"n_heads": 3}, "`n_heads` is 3; it must divide"),
        ({"segment_size": 0}, "`segment_size` is 0; it must be an integer of at least 1"),
    ],
)
def test_what_a_field_is_overridden_by_is_checked(checkpoint: str, overrides: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        VllmConfig(model_config=model_config(checkpoint, hf_overrides=overrides))


def test_an_option_of_the_plugin_in_the_wrong_place_is_refused_at_the_start(vllm_config: VllmConfig):
    vllm_config.additional_config = {"schedule": "diagonal"}
    with pytest.raises(ValueError, match="at its top, where vllm-armt does not look"):
        RecurrentHook.verify_and_update_config(vllm_config)


def test_unknown_options_of_the_plugin_are_refused_at_the_start(vllm_config: VllmConfig):
    vllm_config.additional_config = {"armt": {"lanes": 3}}
    with pytest.raises(ValueError, match="unknown options lanes"):
        RecurrentHook.verify_and_update_config(vllm_config)


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
