"""A fresh model of every system around a base model on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.support.golden_cases import ROOT, relative_l2
from vllm_armt.checkpoints import init_from_base

SIZES: dict[str, Any] = {"segment_size": 16, "num_mem_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {"armt": {"d_mem": 8}, "armt_sw": {"d_mem": 8}, "prmt": {}, "rmt": {}}
"""By system, what it cannot do without."""

BASES = {
    "llama tied": "armt_llama_gqa_tied",
    "llama": "armt_llama_untied",
    "qwen2": "armt_qwen2",
    "qwen3": "armt_qwen3",
    "gpt2": "armt_gpt2_wrap",
    "gpt_neox": "armt_neox",
}


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[[str], Path]:
    """A function from one of `BASES` to the directory of a random model of it, in bfloat16."""

    def make(name: str) -> Path:
        config = AutoConfig.from_pretrained(ROOT / BASES[name] / "base_config")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.generation_config = GenerationConfig(eos_token_id=[7, 8])
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        return tmp_path / "base"

    return make


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, make_base: Callable[[str], Path]) -> Path:
    return make_base(request.param)


@pytest.fixture(params=OPTIONS)
def system(request: pytest.FixtureRequest) -> str:
    return request.param


def init(base: Path, system: str, **options: Any) -> Path:
    dst = base.parent / system
    init_from_base(str(base), dst, system=system, **SIZES, **(OPTIONS[system] | options))
    return dst


def read_config(dst: Path) -> dict[str, Any]:
    return json.loads((dst / "config.json").read_text())


@pytest.mark.parametrize("system", ["armt", "armt_sw"])
def test_an_armt_is_the_base_model_inside_one_segment(base: Path, system: str) -> None:
    ids = torch.arange(16).view(1, 16)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    actual = AutoModelForCausalLM.from_pretrained(init(base, system), dtype=torch.float32)(ids).logits
    assert relative_l2(actual.detach(), expected.detach()) < 1e-5


def test_every_system_opens_on_every_backbone_and_keeps_the_base(base: Path, system: str) -> None:
    dst = init(base, system)
    model, report = AutoModelForCausalLM.from_pretrained(dst, output_loading_info=True)
    assert not any(report.values())
    assert (model.config.model_type, model.dtype) == (system, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.arange(40).view(1, 40)).logits).all()
    assert (dst / "tokenizer.json").exists()
    assert model.generation_config.eos_token_id == [7, 8]
    assert str(dst.parent) not in (dst / "config.json").read_text()
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    ours = {name.replace(".layer.", "."): tensor for name, tensor in model.model.state_dict().items()}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("armt", {"variant": "v1", "state_dtype": "bfloat16", "memory_dtype": "float32"}),
        ("armt", {"n_heads": 2, "gating": True, "generation_policy": "open", "segment_alignment": "right"}),
        ("armt_sw", {"use_sink": True}),
        ("prmt", {"aliased": False, "generation_policy": "commit"}),
        ("rmt", {"memory_dtype": "float32", "generation_policy": "commit"}),
    ],
)
def test_options_reach_the_config(make_base: Callable[[str], Path], system: str, options: dict[str, Any]) -> None:
    config = read_config(init(make_base("llama tied"), system, **options))
    assert {name: config[name] for name in options | SIZES} == options | SIZES


@pytest.mark.parametrize(
    ("system", "name", "options"),
    [
        ("armt", "gpt2", {"wrap_pos": True}),
        ("armt_sw", "llama", {"use_sink": True}),
        ("prmt", "gpt2", {"wrap_pos": True}),
        ("rmt", "gpt2", {"wrap_pos": True}),
    ],
)
def test_the_seed_decides_what_is_drawn(
    make_base: Callable[[str], Path], system: str, name: str, options: dict[str, Any]
) -> None:
    base = make_base(name)

    def drawn(name: str, seed: int) -> dict[str, torch.Tensor]:
        dst = base.parent / name
        init_from_base(str(base), dst, system=system, **SIZES, **OPTIONS[system], **options, seed=seed)
        parameters = AutoModelForCausalLM.from_pretrained(dst).named_parameters()
        return {name: p for name, p in parameters if name.endswith(("memory", "sink", "W_mq.weight", "wpe.weight"))}

    first, again, other = drawn("a", 1), drawn("b", 1), drawn("c", 2)
    assert first.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


class TestLearnedPositions:
    def test_they_restart_unless_asked_otherwise(self, make_base: Callable[[str], Path], system: str) -> None:
        assert read_config(init(make_base("gpt2"), system))["learned_positions"] == "restart"

    def test_they_can_grow(self, make_base: Callable[[str], Path], system: str) -> None:
        assert read_config(init(make_base("gpt2"), system, learned_positions="grow"))["learned_positions"] == "grow"

    @pytest.mark.parametrize(("system", "before", "after"), [("armt", 0, 4), ("prmt", 4, 4), ("rmt", 4, 4)])
    def test_memory_tokens_get_their_own(
        self, make_base: Callable[[str], Path], system: str, before: int, after: int
    ) -> None:
        base = make_base("gpt2")
        old = AutoModelForCausalLM.from_pretrained(base).transformer.wpe.weight
        new = AutoModelForCausalLM.from_pretrained(init(base, system, wrap_pos=True)).model.transformer.wpe.weight
        assert len(new) == before + len(old) + after
        assert torch.equal(new[before : before + len(old)], old)
        assert new[:before].any(dim=1).all()
        assert new[before + len(old) :].any(dim=1).all()

    def test_other_backbones_have_none(self, make_base: Callable[[str], Path]) -> None:
        with pytest.raises(ValueError, match="a gpt_neox has no learned positions"):
            init(make_base("gpt_neox"), "rmt", wrap_pos=True)


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("rmt", {"d_mem": 8}, "System 'rmt' has no option `d_mem`, only armt, armt_sw have: leave it out."),
        ("prmt", {"n_heads": 2}, "System 'prmt' has no option `n_heads`"),
        ("rmt", {"use_sink": True}, "System 'rmt' has no option `use_sink`, only armt, armt_sw have: leave it out."),
        ("rmt", {"aliased": True}, "System 'rmt' has no option `aliased`, only prmt has: leave it out."),
        ("armt_sw", {"gating": True}, "no gating"),
        ("armt", {"n_heads": 3}, "`n_heads` is 3"),
        ("armt", {"gating": True, "variant": "v1"}, "exist from variant 'v2' on"),
    ],
)
def test_what_the_system_cannot_be_is_refused(
    make_base: Callable[[str], Path], system: str, options: dict[str, Any], message: str
) -> None:
    base = make_base("llama tied")
    with pytest.raises(ValueError, match=re.escape(message)):
        init(base, system, **options)
    assert [path.name for path in base.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("system", ["armt", "armt_sw"])
def test_an_armt_needs_the_width_of_its_memory(make_base: Callable[[str], Path], system: str) -> None:
    base = make_base("llama tied")
    with pytest.raises(ValueError, match=f"System '{system}' needs `d_mem`, the width of memory queries and keys"):
        init_from_base(str(base), base.parent / "dst", system=system, **SIZES)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./absent", "The directory ./absent does not exist. Give the base model: a path, or OWNER/NAME of the"),
        ("../absent/", "The directory ../absent/ does not exist."),
        ("owner/absent", "There is no owner/absent here, and the base model of that name can't be fetched"),
    ],
)
def test_a_base_model_that_is_not_there_is_named(tmp_path: Path, base: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(message)) as error:
        init_from_base(base, tmp_path / "dst", d_mem=8, **SIZES)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "dst").exists()


def test_the_text_model_of_a_gemma_3_that_sees_images_is_the_base(tmp_path: Path) -> None:
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    images = {"mm_tokens_per_image": 1, "image_token_index": 61, "boi_token_index": 62, "eoi_token_index": 63}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, **images
    )
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(init(tmp_path / "base", "armt"))
    ids = torch.arange(SIZES["segment_size"])[None]
    with torch.no_grad():
        assert relative_l2(model(ids).logits, whole(ids).logits) < 1e-5
    assert (model.config.base_model_config.model_type, model.config.reaches) == ("gemma3_text", [5, None])


def test_an_unsupported_base_leaves_nothing_behind(tmp_path: Path, system: str) -> None:
    config = AutoConfig.for_model(
        "opt",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        ffn_dim=8,
        vocab_size=16,
        word_embed_proj_dim=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="'opt', which is not supported"):
        init(tmp_path / "base", system)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
