"""A config.json of ours holds what is known, of its type and in its range, or a sentence names what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from tests.support.configs import GPT2_SIZES, GPT_NEO_SIZES, SIZES, config, every_system, gpt2
from tests.support.golden_cases import HF
from vllm_armt.config import CONFIGS, ARMTConfig, PRMTConfig, RecurrentConfig, Refused
from vllm_armt.config.base_model import parsed
from vllm_armt.hf import MODELS
from vllm_armt.integration import plugin

RAW: dict[str, Any] = {"base_model_config": LlamaConfig(**SIZES).to_dict()}
SHIPPED = Path(__file__).parents[2] / "examples" / "models"


def refused(message: str, system: Any = ARMTConfig, **fields: Any) -> list[str]:
    """The reasons for which a config.json is refused; one of them begins with the message."""
    raw = config(system=system).to_dict() | fields
    with pytest.raises(Refused) as error:
        system.from_dict(raw)
    assert any(reason.startswith(message) for reason in error.value.reasons), error.value.reasons
    return error.value.reasons


@every_system
def test_the_architecture_is_the_class_that_serves_it(system: type[RecurrentConfig]) -> None:
    assert MODELS[system.model_type].__name__ == system.architecture
    assert plugin.MODELS[system.model_type].partition(":")[2] == system.architecture
    assert system.from_dict(config(system=system).to_dict() | {"architectures": [system.architecture]})


@pytest.mark.parametrize("given", [["OtherARMTForCausalLM"], ["ARMTSlidingWindowForCausalLM"], ["ARMTForCausalLM"] * 2])
def test_another_architecture_is_refused_with_the_one_that_is_known(given: list[str]) -> None:
    reasons = refused(
        f"`architectures` is {given!r}; a model of type 'armt' is a ['ARMTForCausalLM'].", architectures=given
    )
    assert len(reasons) == 1


@every_system
def test_unknown_keys_are_named(system: type[RecurrentConfig]) -> None:
    reasons = refused(
        f"config.json has keys that a model of type {system.model_type!r} does not: `foo_bar`, `reading_speed",
        system,
        foo_bar=3,
        reading_speed=2,
    )
    assert "Known are " in reasons[0]
    assert " base_model_config, base_model_name, " in reasons[0]


@pytest.mark.parametrize("name", ["state", "window", "to_dict", "__class__", "_validate", "get_text_config"])
def test_names_of_the_configurations_own_parts_are_no_keys(name: str) -> None:
    refused(f"config.json has a key that a model of type 'armt' does not: `{name}`", **{name: 1})


def test_keys_of_transformers_and_of_the_base_model_are_known() -> None:
    known = {
        "auto_map": {"AutoConfig": "modeling_armt.ARMTConfig"},
        "do_sample": False,
        "max_length": 20,
        "name_or_path": "x",
        "num_hidden_layers": 3,
        "output_attentions": False,
        "tokenizer_class": None,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 8,
    }
    assert ARMTConfig.from_dict(config().to_dict() | known)


def test_a_key_of_the_base_models_may_not_contradict_it() -> None:
    refused("`hidden_size` is 32, but `base_model_config` says 16.", hidden_size=32)
    assert config(MistralConfig(**SIZES, sliding_window=64)).sliding_window is False


@pytest.mark.parametrize(
    ("system", "name", "value", "allowed"),
    [
        (ARMTConfig, "correction", "false", "true or false"),
        (ARMTConfig, "use_denom", "no", "true or false"),
        (ARMTConfig, "gating", 1, "true or false"),
        (ARMTConfig, "wrap_pos", "true", "true or false or null"),
        (ARMTConfig, "sliding_window", 512, "true or false or null"),
        (PRMTConfig, "aliased", "no", "true or false"),
        (ARMTConfig, "wrap_layers", [1, 0, 1], "a list of true and false or null"),
        (ARMTConfig, "wrap_layers", "all", "a list of true and false or null"),
        (ARMTConfig, "layers_attr", 5, "a string or null"),
        (ARMTConfig, "base_model_name", ["a"], "a string or null"),
    ],
)
def test_a_value_of_another_type_is_refused(system: Any, name: str, value: Any, allowed: str) -> None:
    refused(f"`{name}` is {value!r}; it must be {allowed}.", system, **{name: value})


@pytest.mark.parametrize("name", ["segment_size", "num_mem_tokens", "d_mem", "n_heads", "max_context"])
@pytest.mark.parametrize("value", [0, -4, 10**400, 1.5, float("nan"), float("inf"), "16", True, [16]])
def test_a_size_out_of_range_is_refused(name: str, value: Any) -> None:
    most = 1 << 31 if name == "max_context" else 1 << 20
    (reason,) = refused(f"`{name}` is ", **{name: value})
    assert f"it must be an integer of at least 1 and at most {most}" in reason
    assert len(reason) < 200


@pytest.mark.parametrize(
    "name", ["generation_policy", "variant", "state_dtype", "learned_positions", "segment_alignment"]
)
def test_a_choice_of_another_type_is_refused(name: str) -> None:
    refused(f"`{name}` is {{'a': 1}}; allowed: ", **{name: {"a": 1}})


def test_all_faults_are_named_at_once() -> None:
    reasons = refused(
        "`correction` is", correction="false", foo=1, architectures=["X"], segment_size=0, act_on=True, vocab_size=9
    )
    assert [reason.partition(" ")[0] for reason in reasons] == [
        *("`architectures`", "`correction`", "`act_on`", "config.json", "`vocab_size`", "`segment_size`")
    ]
    both = refused("`n_heads` is 3", n_heads=3, wrap_layers=[True])
    assert both[0] == "`wrap_layers` has 1 entries, but the base model has 3 layers."


class TestBaseModel:
    @pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
    @pytest.mark.parametrize("value", [0, -1, 10**9, 10**400, "8", 1.0])
    def test_a_size_out_of_range_is_refused_before_anything_is_made_of_it(self, name: str, value: Any) -> None:
        (reason,) = refused(
            f"`base_model_config`: `{name}` is ", base_model_config=RAW["base_model_config"] | {name: value}
        )
        assert "it must be an integer of at least 1 and at most " in reason

    @pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_positions"])
    def test_sizes_are_known_by_the_backbones_own_names(self, name: str) -> None:
        base = gpt2(learned_positions="restart").base_model_config.to_dict()
        refused(f"`base_model_config`: `{name}` is 0", base_model_config=base | {name: 0})

    def test_counts_of_repeated_layers_are_bounded(self) -> None:
        base = {"model_type": "gpt_neo", **GPT_NEO_SIZES, "attention_types": [[["global", "local"], 10**9]]}
        refused("`base_model_config`: `attention_types` is [[['global', 'local'], 1000000000]]", base_model_config=base)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_type": ["llama"]}, "The base model is of type ['llama'], which is not supported"),
            ({"num_labels": 10**9}, "`base_model_config`: `num_labels` is 1000000000"),
            ({"quantization_config": {"bits": 4}}, "`base_model_config` has `quantization_config`"),
            ({"per_layer_config": {"0": {"hidden_size": 8}}}, "`base_model_config` has `per_layer_config`"),
            ({"to_dict": 1}, "`base_model_config` has a key `to_dict`, which is the name of a method"),
            (
                {"hidden_act": 3},
                "transformers makes no configuration of `base_model_config`: Field 'hidden_act' expected",
            ),
            ({"id2label": {"a": "b"}}, "transformers makes no configuration of `base_model_config`: "),
            ({"num_attention_heads": 3}, "transformers makes no configuration of `base_model_config`: The hidden size"),
            ({"rope_parameters": 5}, "transformers makes no configuration of `base_model_config`: "),
        ],
    )
    def test_what_transformers_cannot_make_one_of_is_one_sentence(self, fields: dict[str, Any], message: str) -> None:
        (reason,) = refused(message, base_model_config=RAW["base_model_config"] | fields)
        assert "\n" not in reason

    @pytest.mark.parametrize("given", ["llama", 3, ["llama"]])
    def test_it_is_an_object(self, given: Any) -> None:
        refused(f"`base_model_config` is {given!r}; it must be the base model's config.json", base_model_config=given)

    def test_what_transformers_ignores_in_it_is_ignored(self) -> None:
        assert config(base_model_config=RAW["base_model_config"] | {"rope_interleaved": False, "unsloth_fixed": True})

    @pytest.mark.parametrize(
        "raw",
        [
            {
                **{"model_type": "llama", "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5},
                **{"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "rope_scaling": None},
                **{"torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
            },
            {
                **{"model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "n_embd": 768, "n_layer": 12},
                **{"summary_type": "cls_index", "task_specific_params": {"text-generation": {"max_length": 50}}},
            },
            {
                **{"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25, "hidden_size": 512},
                **{"num_attention_heads": 8, "use_parallel_residual": True, "torch_dtype": "float16"},
            },
            {
                **{"model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_mrope": False},
                **{"use_sliding_window": False, "hidden_size": 896, "num_attention_heads": 14},
            },
            {
                **{"model_type": "llama", "eos_token_id": [128001, 128008], "rope_theta": 500000.0},
                "rope_scaling": {
                    **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
                    "original_max_position_embeddings": 8192,
                },
            },
        ],
        ids=["SmolLM2", "GPT-2", "Pythia", "Qwen2.5", "Llama 3.2"],
    )
    def test_files_as_they_are_published_are_taken(self, raw: dict[str, Any]) -> None:
        assert parsed(raw, "config.json").model_type == raw["model_type"]

    def test_a_name_that_leads_nowhere_is_one_sentence(self) -> None:
        with pytest.raises(
            Refused, match=r"`base_model_name` is 'absent/name', whose config\.json can't be read.*Put the base"
        ):
            config(base_model_config=None, base_model_name="absent/name")

    def test_one_of_another_kind_is_refused(self) -> None:
        with pytest.raises(Refused, match="'opt', which is not supported"):
            config(AutoConfig.for_model("opt", **{"vocab_size": 8}))


@pytest.mark.parametrize(
    "file", [*(case.path / name for case in HF for name in ("config.json", "config.tf5.json"))], ids=str
)
def test_the_authors_newest_files_hold_what_is_known(file: Path) -> None:
    raw = json.loads(file.read_text())
    assert {system.model_type: system for system in CONFIGS}[raw["model_type"]].from_dict(raw)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*/config.json")), ids=lambda file: file.parent.name)
def test_shipped_models_hold_what_is_known(file: Path) -> None:
    assert ARMTConfig.from_dict(json.loads(file.read_text()))


def test_gpt2_sizes_by_either_name_are_known() -> None:
    assert gpt2(n_embd=GPT2_SIZES["n_embd"], hidden_size=GPT2_SIZES["n_embd"], learned_positions="restart")
