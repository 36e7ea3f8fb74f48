"""What an ARMT's config.json may say, what is refused and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_cases import HF, Golden
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from vllm_armt.config import LAYERS_ATTR, ARMTConfig
from vllm_armt.core import MemoryRule

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,
}
REQUIRED = {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8}


def config(base: PretrainedConfig | None = None, **fields: Any) -> ARMTConfig:
    return ARMTConfig(**{"base_model_config": base or LlamaConfig(**SIZES)} | REQUIRED | fields)


def golden_config(golden: Golden, spelling: str, directory: Path) -> ARMTConfig:
    shutil.copy(golden.path / spelling, directory / "config.json")
    return ARMTConfig.from_pretrained(directory)


@pytest.mark.parametrize("spelling", ["config.json", "config.tf5.json"], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
def test_the_authors_files_open_as_they_are(golden: Golden, spelling: str, tmp_path: Path):
    opened = golden_config(golden, spelling, tmp_path)
    written = json.loads((golden.path / spelling).read_text())
    for name in ("segment_size", "num_mem_tokens", "d_mem", "correction", "use_denom", "wrap_layers", "model_dtype"):
        assert getattr(opened, name) == written[name]
    base = written["base_model_config"]
    assert opened.tie_word_embeddings == base["tie_word_embeddings"]
    assert opened.get_text_config().hidden_size == base["hidden_size"]
    assert opened.base_model_config.rope_parameters["rope_theta"] == 10000.0
    assert opened.feature_size == 6 * written["d_mem"]
    assert opened.memory_rule == MemoryRule(True, written["correction"], written["use_denom"])


@pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
def test_both_spellings_of_a_file_mean_the_same(golden: Golden, tmp_path: Path):
    four, five = (golden_config(golden, name, tmp_path) for name in ("config.json", "config.tf5.json"))
    ignored = {"transformers_version", "base_model_config"}
    a, b = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (four, five))
    assert a == b
    for name in (*SIZES, "rope_parameters", "head_dim", "rms_norm_eps", "attention_bias", "tie_word_embeddings"):
        assert getattr(four.base_model_config, name) == getattr(five.base_model_config, name)


def test_a_saved_config_opens_again_with_every_field(tmp_path: Path):
    saved = config(
        LlamaConfig(**SIZES, tie_word_embeddings=True, eos_token_id=5),
        correction=False,
        use_denom=False,
        variant="v1",
        wrap_layers=[True, False, True],
        model_dtype="bfloat16",
        memory_dtype="float32",
        state_dtype="bfloat16",
        generation_policy="open",
        max_context=4096,
        freeze_mem=True,
    )
    saved.save_pretrained(tmp_path)
    opened = ARMTConfig.from_pretrained(tmp_path)
    assert opened.to_dict() == saved.to_dict()
    assert isinstance(opened.base_model_config, LlamaConfig)
    assert (opened.tie_word_embeddings, opened.eos_token_id) == (True, 5)


def test_auto_config_opens_it_once_registered(tmp_path: Path):
    AutoConfig.register("armt", ARMTConfig, exist_ok=True)
    config(variant="v1").save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(opened, ARMTConfig)
    assert opened.variant == "v1"


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_if_the_base_models_is(tied: bool):
    base = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    assert config(base).tie_word_embeddings is tied
    assert config(base, tie_word_embeddings=not tied).tie_word_embeddings is tied


def test_a_base_model_may_be_a_dict():
    base = LlamaConfig(**SIZES).to_dict()
    assert config(base_model_config=base).base_model_config.hidden_size == 16


def test_a_base_model_may_be_named(tmp_path: Path):
    Qwen2Config(**SIZES).save_pretrained(tmp_path)
    named = config(base_model_config=None, base_model_name=str(tmp_path))
    assert (named.base_model_config.model_type, named.layers_attr) == ("qwen2", "model.layers")


def test_special_tokens_are_the_base_models_unless_given():
    base = LlamaConfig(**SIZES, bos_token_id=3, eos_token_id=4)
    assert (config(base).bos_token_id, config(base).eos_token_id) == (3, 4)
    assert config(base, eos_token_id=6).eos_token_id == 6


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, MemoryRule(normalize=True, correction=True, use_denom=True)),
        ({"variant": "v1"}, MemoryRule(normalize=False, correction=True, use_denom=True)),
        ({"correction": False}, MemoryRule(normalize=True, correction=False, use_denom=True)),
        ({"use_denom": False}, MemoryRule(normalize=True, correction=True, use_denom=False)),
    ],
)
def test_the_memory_rule_follows_the_fields(fields: dict[str, Any], rule: MemoryRule):
    assert config(**fields).memory_rule == rule


def test_all_layers_have_a_memory_unless_wrap_layers_leaves_some_out():
    assert config().has_memory == [True, True, True]
    assert config(wrap_layers=[True, False, True]).has_memory == [True, False, True]


def test_the_dtype_of_the_model_is_the_base_models_unless_given():
    assert config(LlamaConfig(**SIZES, dtype="bfloat16")).model_dtype == "bfloat16"
    given = config(LlamaConfig(**SIZES, dtype="bfloat16"), model_dtype="float32", dtype="float16")
    assert given.model_dtype == "float32"
    assert str(given.dtype) in ("float32", "torch.float32")
    assert given.memory_dtype is None


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_field_is_named(name: str):
    with pytest.raises(ValueError, match=rf"config.json has no `{name}`.*cannot be guessed.*trained with"):
        config(**{name: None})


@pytest.mark.parametrize("value", [0, -1, 1.5, "16", True])
@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_field_out_of_range_is_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"`{name}` is {value!r}; it must be an integer of at least 1"):
        config(**{name: value})


def test_a_backbone_that_is_not_supported_is_refused_with_those_that_are():
    supported = ", ".join(sorted(LAYERS_ATTR))
    with pytest.raises(ValueError, match=rf"of type 'gpt2', which is not supported\. Supported: {supported}\."):
        config(base_model_config={"model_type": "gpt2"})


def test_a_base_model_without_a_type_is_refused():
    with pytest.raises(ValueError, match=r"`base_model_config` has no `model_type`\. Supported: llama, mistral"):
        config(base_model_config={"hidden_size": 16})


def test_no_base_model_is_refused():
    with pytest.raises(ValueError, match=r"neither `base_model_config`.*nor `base_model_name`"):
        config(base_model_config=None)


def test_layers_in_another_place_are_refused():
    with pytest.raises(ValueError, match=r"`layers_attr` is 'transformer.h', but a llama keeps .* 'model.layers'"):
        config(layers_attr="transformer.h")


@pytest.mark.parametrize("alignment", ["left", None])
def test_segments_from_the_first_token_on_are_supported(alignment: str | None):
    assert config(segment_alignment=alignment).segment_size == 16


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_other_alignments_are_refused(alignment: str):
    with pytest.raises(ValueError, match=rf"`segment_alignment` is '{alignment}'; only 'left' is supported"):
        config(segment_alignment=alignment)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("variant", "'v1', 'v2'"),
        ("generation_policy", "'commit', 'open'"),
        ("state_dtype", "'float32', 'bfloat16'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name: str, allowed: str):
    with pytest.raises(ValueError, match=rf"`{name}` is 'other'; allowed: {allowed}\."):
        config(**{name: "other"})


def test_wrap_layers_of_another_length_than_the_model_is_refused():
    with pytest.raises(ValueError, match="`wrap_layers` has 2 entries, but the base model has 3 layers"):
        config(wrap_layers=[True, False])


@pytest.mark.parametrize("name", ["model_dtype", "memory_dtype"])
def test_a_name_that_is_no_dtype_is_refused(name: str):
    with pytest.raises(ValueError, match=r"'fp32' is not a floating-point torch dtype; write for instance 'float32'"):
        config(**{name: "fp32"})


LEGACY = {
    "n_heads": (1, 2),
    "gating": (False, True),
    "act_on": (False, True),
    "attend_to_previous_input": (False, True),
    "sliding_window": (False, 128),
    "sliding_window_enabled": (False, True),
    "use_sink": (False, True),
    "wrap_pos": (False, True),
}


def test_old_fields_at_harmless_values_are_dropped():
    old = config(**{name: harmless for name, (harmless, _) in LEGACY.items()})
    assert not old.to_dict().keys() & LEGACY.keys()


@pytest.mark.parametrize(("name", "harmless", "harmful"), [(name, *values) for name, values in LEGACY.items()])
def test_old_fields_that_change_the_mathematics_are_refused(name: str, harmless: Any, harmful: Any):
    with pytest.raises(ValueError, match=rf"`{name}` is {harmful!r}\..*only {harmless!r} is\."):
        config(**{name: harmful})


def test_settings_of_options_that_are_off_are_dropped():
    dropped = {"act_type": "layer", "max_hop": 4, "time_penalty": 0.1, "base_attn_implementation": "eager"}
    assert not config(**dropped).to_dict().keys() & dropped.keys()


def test_an_old_config_with_unwrapped_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"`wrap_layers` leaves layers out and the config is an old one \(it has gating"
    ):
        config(wrap_layers=[True, False, True], gating=False)


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(MistralConfig(**SIZES, sliding_window=19), id="mistral"),
        pytest.param(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=19, max_window_layers=0), id="qwen2"),
    ],
)
def test_a_sliding_window_shorter_than_a_segment_and_its_memory_tokens_is_refused(base: PretrainedConfig):
    with pytest.raises(ValueError, match=r"sliding window of 19 tokens.*\(16 \+ 4\)"):
        config(base)


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(MistralConfig(**SIZES, sliding_window=20), id="mistral, as long as a segment"),
        pytest.param(MistralConfig(**SIZES, sliding_window=None), id="mistral without"),
        pytest.param(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=19), id="qwen2, off"),
    ],
)
def test_a_sliding_window_that_no_segment_reaches_is_harmless(base: PretrainedConfig):
    assert config(base).segment_size == 16
