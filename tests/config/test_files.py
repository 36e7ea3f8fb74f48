"""Opening and saving a config.json, and what its fields mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.support.configs import SIZES, config, every_system
from tests.support.golden_cases import HF, Golden
from vllm_armt.config import BACKBONES, CONFIGS, ARMTConfig, RecurrentConfig
from vllm_armt.core import MemoryRule


def golden_config(golden: Golden, spelling: str, directory: Path) -> Any:
    shutil.copy(golden.path / spelling, directory / "config.json")
    system = {system.model_type: system for system in CONFIGS}[golden.system]
    return system.from_pretrained(directory)


@pytest.mark.parametrize("spelling", ["config.json", "config.tf5.json"], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
def test_the_authors_files_open_as_they_are(golden: Golden, spelling: str, tmp_path: Path):
    opened = golden_config(golden, spelling, tmp_path)
    written = json.loads((golden.path / spelling).read_text())
    for name in ("segment_size", "num_mem_tokens", "d_mem", "correction", "use_denom", "wrap_layers", "model_dtype"):
        assert getattr(opened, name) == written[name]
    base = written["base_model_config"]
    assert opened.tie_word_embeddings == base["tie_word_embeddings"]
    assert opened.get_text_config().hidden_size == base.get("hidden_size", base.get("n_embd"))
    if opened.backbone.positions is None:
        theta = base["rope_theta"] if "rope_theta" in base else base["rope_parameters"]["rope_theta"]
        assert opened.base_model_config.rope_parameters["rope_theta"] == theta
    assert opened.feature_size == 6 * written["d_mem"]
    assert opened.memory_rule == MemoryRule(True, written["correction"], written["use_denom"])


@pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
def test_both_spellings_of_a_file_mean_the_same(golden: Golden, tmp_path: Path):
    four, five = (golden_config(golden, name, tmp_path) for name in ("config.json", "config.tf5.json"))
    ignored = {"transformers_version", "base_model_config"}
    a, b = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (four, five))
    assert a == b
    foreign = {"transformers_version", "_name_or_path", "dtype", "torchscript", "use_bfloat16", "pruned_heads"}
    a, b = (c.base_model_config.to_dict() for c in (four, five))
    assert {name: a[name] for name in b.keys() - foreign} == {name: b[name] for name in b.keys() - foreign}


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
    )
    saved.save_pretrained(tmp_path)
    opened = ARMTConfig.from_pretrained(tmp_path)
    assert opened.to_dict() == saved.to_dict()
    assert isinstance(opened.base_model_config, LlamaConfig)
    assert (opened.tie_word_embeddings, opened.eos_token_id) == (True, 5)


@every_system
def test_auto_config_opens_it_once_registered(system: type[RecurrentConfig], tmp_path: Path):
    AutoConfig.register(system.model_type, system, exist_ok=True)
    config(system=system, max_context=4096).save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert type(opened) is system
    assert opened.max_context == 4096


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
        ({"n_heads": 4}, MemoryRule(normalize=True, correction=True, use_denom=True, heads=4)),
    ],
)
def test_the_memory_rule_follows_the_fields(fields: dict[str, Any], rule: MemoryRule):
    assert config(**fields).memory_rule == rule


@pytest.mark.parametrize(("fields", "size"), [({}, 1), ({"n_heads": 2}, 2), ({"gating": True, "n_heads": 2}, 16)])
def test_beta_is_one_a_head_or_one_a_channel(fields: dict[str, Any], size: int):
    assert config(**fields).beta_size == size


def test_all_layers_have_a_memory_unless_wrap_layers_leaves_some_out():
    assert config().has_memory == [True, True, True]
    assert config(wrap_layers=[True, False, True]).has_memory == [True, False, True]


def test_the_dtype_of_the_model_is_the_base_models_unless_given():
    assert config(LlamaConfig(**SIZES, dtype="bfloat16")).model_dtype == "bfloat16"
    given = config(LlamaConfig(**SIZES, dtype="bfloat16"), model_dtype="float32", dtype="float16")
    assert given.model_dtype == "float32"
    assert str(given.dtype) in ("float32", "torch.float32")
    assert given.memory_dtype is None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_keep_their_parts_where_the_table_says(backbone: str):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(backbone))
    where = BACKBONES[backbone]
    assert model.get_submodule(where.embeddings) is model.get_input_embeddings()
    assert len(model.get_submodule(where.layers)) == model.config.num_hidden_layers
    assert model.get_submodule(where.norm).weight.shape == (model.config.hidden_size,)
    learned = [name for name, module in model.named_modules() if name.endswith("wpe")]
    assert learned == ([] if where.positions is None else [where.positions])
