"""What cannot be served is refused with a message that names the cause, and before weights are loaded if it can be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BloomConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from examples.server import serve
from tests.support.engines import engine
from tests.support.golden_cases import Golden

GOLDEN = Golden("armt_hf_llama")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of its own that a test may spoil."""
    GOLDEN.copy_checkpoint(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if vLLM gets as far as building the model."""

    def load_model(*args: Any, **kwargs: Any) -> None:
        pytest.fail("vLLM started to load the model")

    monkeypatch.setattr(BaseModelLoader, "load_model", load_model)


def refused(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message), engine(directory, **options):
        pytest.fail("an engine was made")


def edit_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(directory: Path, edit: Callable[[dict], dict]) -> None:
    file = directory / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def to_base_model(weights: dict) -> dict:
    """The backbone alone, by the names that transformers gives it."""
    names = {name: name.removeprefix("model.").replace(".layer.", ".") for name in weights}
    return {names[name]: tensor for name, tensor in weights.items() if name != "memory" and ".W_m" not in name}


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_truncated_file_is_named(directory, kept):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(directory, rf"{re.escape(str(file))} is damaged or incomplete .*Copy or download it again")


def test_the_weights_of_a_base_model_are_told_from_an_armts(directory):
    edit_weights(directory, to_base_model)
    refused(directory, r"has tensors that a model .* does not: model\.embed_tokens\.weight.*`vllm-armt init`")


def test_missing_tensors_are_named(directory):
    edit_weights(directory, lambda weights: {name: w for name, w in weights.items() if name != "memory"})
    refused(directory, r"lacks tensors that its config\.json asks for: memory")


def test_a_size_that_contradicts_the_weights_is_named(directory):
    edit_config(directory, d_mem=16)
    refused(directory, r"'model\.model\.layers\.\d\.W_m[qk]\.weight' has shape \[8, 64\].*asks for \[16, 64\]")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_size": None}, r"config\.json has no `segment_size`.*trained with"),
        ({"num_mem_tokens": 0}, r"`num_mem_tokens` is 0; it must be an integer of at least 1"),
        (
            {"base_model_config": BloomConfig().to_dict()},
            r"of type 'bloom'.*Supported: gemma, gemma3_text, gpt2, gpt_neo, gpt_neox",
        ),
        ({"n_heads": 3}, r"`n_heads` is 3; it must divide d_mem \(8\)"),
        ({"act_on": True}, r"`act_on` is True.*only False is"),
        ({"segment_alignment": "right"}, r"`segment_alignment` is 'right' and `generation_policy` is 'commit'.*'open'"),
    ],
)
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_config_that_is_not_supported_is_refused_by_its_field(directory, fields, message):
    edit_config(directory, **fields)
    refused(directory, message)


@pytest.mark.parametrize(
    ("armt", "message"),
    [
        ({"shedule": "diagonal"}, "unknown options shedule; known: schedule"),
        ({"schedule": "fast"}, "is 'fast'; allowed: 'auto', 'diagonal', 'sequential'"),
        ("diagonal", "is 'diagonal'; it must be an object of options"),
    ],
)
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_an_option_of_the_plugins_that_does_not_exist_is_refused(directory, armt, message):
    refused(directory, message, additional_config={"armt": armt})


NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantization": "fp8"}, "--quantization"),
        ({"speculative_config": NGRAMS}, "--speculative-config"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"block_size": 32}, r"--block-size 32 \(a block is a segment\)"),
        # with a longer max_model_len vLLM asks for it to be lowered first
        ({"enable_chunked_prefill": False, "max_model_len": 64}, "--no-enable-chunked-prefill"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
        ({"kv_events_config": {"enable_kv_cache_events": True}}, "--kv-events-config"),
        ({"runner": "pooling"}, "--runner pooling"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_an_option_of_vllms_that_is_not_supported_is_refused_by_name(directory, options, named):
    refused(directory, rf"A model of type 'armt' can't be served with .*{named}.*Start without it", **options)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize(
    ("flags", "edit", "sentence"),
    [
        (["--kv-cache-dtype", "fp8"], None, "A model of type 'armt' can't be served with --kv-cache-dtype fp8"),
        ([], to_base_model, "A base model is given a memory by `vllm-armt init`"),
    ],
    ids=["option", "weights"],
)
def test_the_server_ends_and_its_log_says_why(directory, tmp_path, monkeypatch, flags, edit, sentence):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    if edit:
        edit_weights(directory, edit)
    log = tmp_path / "log"
    flags = ["--skip-tokenizer-init", "--kv-cache-memory-bytes", str(1 << 26), *flags]
    with pytest.raises(RuntimeError, match="ended with status 1"), serve(directory, flags, log=log, timeout=120):
        pytest.fail("the server is healthy")
    assert sentence in log.read_text()
