"""A fresh ARMT around a base model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import ROOT, relative_l2
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vllm_armt.checkpoints import init_from_base

SIZES: dict[str, Any] = {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8}


@pytest.fixture(params=["armt_llama_gqa_tied", "armt_llama_untied", "armt_qwen2", "armt_qwen3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = AutoConfig.from_pretrained(ROOT / request.param / "base_config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[7, 8])
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def test_it_is_the_base_model_inside_one_segment(base: Path, tmp_path: Path) -> None:
    init_from_base(str(base), tmp_path / "armt", **SIZES)
    ids = torch.arange(16).view(1, 16)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "armt", dtype=torch.float32)(ids).logits
    assert relative_l2(actual.detach(), expected.detach()) < 1e-5


def test_it_keeps_the_bases_dtype_tokenizer_and_generation_config(base: Path, tmp_path: Path) -> None:
    init_from_base(str(base), tmp_path / "armt", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "armt")
    assert model.dtype == model.memory.dtype == torch.bfloat16
    assert (tmp_path / "armt" / "tokenizer.json").exists()
    assert model.generation_config.eos_token_id == [7, 8]
    assert str(tmp_path) not in (tmp_path / "armt" / "config.json").read_text()


def test_options_reach_the_config(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"variant": "v1", "state_dtype": "bfloat16", "memory_dtype": "float32"}
    init_from_base(str(base), tmp_path / "armt", **SIZES, **options)
    config = json.loads((tmp_path / "armt" / "config.json").read_text())
    assert {name: config[name] for name in options | SIZES} == options | SIZES


def test_the_seed_decides_the_memory(base: Path, tmp_path: Path) -> None:
    def memory(name: str, seed: int) -> torch.Tensor:
        init_from_base(str(base), tmp_path / name, **SIZES, seed=seed)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).memory

    assert torch.equal(memory("a", 1), memory("b", 1))
    assert not torch.equal(memory("c", 2), memory("d", 3))


def test_an_unsupported_base_leaves_nothing_behind(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="'gpt2', which is not supported"):
        init_from_base(str(tmp_path / "base"), tmp_path / "armt", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
