"""What the hook refuses at the start, and which options it says to have no effect."""

from __future__ import annotations

import copy
import json
import os
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    KVTransferConfig,
    VllmConfig,
)
from vllm.config.attention import AttentionConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.kv_events import KVEventsConfig
from vllm.platforms.interface import Platform, PlatformEnum

from tests.support.golden_cases import HF
from tests.support.hook_configs import LIMITS, complete, model_config
from vllm_armt.integration import hooks
from vllm_armt.integration.hooks import (
    RecurrentHook,
    refuse_unsupported,
)

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


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 4000}, "look like a .*llama.* of 3 layers, width 64, vocabulary 192, but"),
        ({"vocab_size": 1 << 24}, r"config\.json says a llama of 3 layers, width 64, vocabulary 16777216\."),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_a_model_is_made(
    tmp_path: Path, fields: dict[str, Any], reason: str
):
    HF[0].copy_checkpoint(tmp_path / "golden")
    file = tmp_path / "golden" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"base_model_config": raw["base_model_config"] | fields}))
    with pytest.raises(ValueError, match=reason):
        VllmConfig(model_config=model_config(str(file.parent)))


def test_a_pipe_among_the_weights_is_not_waited_for(tmp_path: Path):
    HF[0].copy_checkpoint(tmp_path / "golden")
    os.mkfifo(tmp_path / "golden" / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"model-2\.safetensors is no regular file"):
        VllmConfig(model_config=model_config(str(tmp_path / "golden")))


def test_an_option_of_the_plugin_in_the_wrong_place_is_refused_at_the_start(vllm_config: VllmConfig):
    vllm_config.additional_config = {"schedule": "diagonal"}
    with pytest.raises(ValueError, match="at its top, where vllm-armt does not look"):
        RecurrentHook.verify_and_update_config(vllm_config)


def test_unknown_options_of_the_plugin_are_refused_at_the_start(vllm_config: VllmConfig):
    vllm_config.additional_config = {"armt": {"lanes": 3}}
    with pytest.raises(ValueError, match="unknown options lanes"):
        RecurrentHook.verify_and_update_config(vllm_config)
