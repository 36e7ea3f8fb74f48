"""Every spelling of the authors' research checkpoints becomes the same directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.golden_cases import ALL, RESEARCH, ROOT, Golden
from tests.support.research_checkpoint import Case
from tests.support.spellings import LAYERS, SPELLINGS, hf_names

ONE_A_SYSTEM = ["armt_llama_gqa_tied", "armt_gpt2_wrap", "armt_neox", "prmt_gpt2_wrap", "rmt_gpt2_wrap", "rmt_llama"]


@pytest.fixture(params=ONE_A_SYSTEM)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    return make_case(request.param)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_cases_are_listed() -> None:
    named = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"version_configs"}
    assert sorted(golden.name for golden in ALL) == sorted(named)


class TestGoldens:
    @pytest.mark.parametrize("golden", RESEARCH, ids=lambda golden: golden.name)
    def test_the_directory_opens_and_says_what_the_wrapper_was(
        self, golden: Golden, golden_directory: Callable[[Golden], Path]
    ) -> None:
        model, report = AutoModelForCausalLM.from_pretrained(golden_directory(golden), output_loading_info=True)
        assert not any(report.values())
        config = model.config
        assert (config.model_type, config.learned_positions, config.generation_policy) == (
            golden.system,
            "restart",
            "open",
        )
        told = golden.args.keys() - {"system", "lora", "dtype", "seed", "layers_attr"}
        assert {name: getattr(config, name) for name in told} == {name: golden.args[name] for name in told}
        assert config.model_dtype == golden.args["dtype"]

    @pytest.mark.parametrize(("name", "variant"), [("armt_llama_gqa_tied", "v1"), ("armtv2_llama", "v2")])
    def test_the_wrappers_name_tells_the_variant(
        self, make_case: Callable[[str], Case], name: str, variant: str
    ) -> None:
        assert make_case(name).convert().config.variant == variant


class TestSpellings:
    @pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda spelled: spelled.__name__)
    def test_all_become_the_same(self, case: Case, spelled: Callable[[Case, Path], Path]) -> None:
        conversion = case.convert(spelled(case, case.folder))
        assert equal(case.result(), hf_names(case))
        assert conversion.left_out == (["memory_cell.memory"] if case.name.startswith("prmt") else [])

    def test_an_untied_head_is_kept(self, untied: Case) -> None:
        untied.convert()
        assert equal(untied.result(), hf_names(untied))
        assert "model.lm_head.weight" in untied.result()

    def test_a_student_beside_its_teacher(self, case: Case) -> None:
        names = hf_names(case)
        case.tensors = {"student." + key: value for key, value in case.tensors.items()}
        case.tensors["teacher.model.norm.weight"] = torch.ones(64)
        conversion = case.convert()
        assert equal(case.result(), names)
        assert "teacher.model.norm.weight" in conversion.left_out

    def test_the_outer_loop_class(self, tied: Case) -> None:
        names = hf_names(tied)
        tied.tensors = {"armt." + key: value for key, value in tied.tensors.items()}
        tied.convert()
        assert equal(tied.result(), names)

    @pytest.mark.parametrize(
        ("name", "buffers"),
        [
            ("armt_llama_gqa_tied", ["memory_cell.layers.0.layer.self_attn.rotary_emb.inv_freq"]),
            ("prmt_gpt2_wrap", [f"memory_cell.layers.1.layer.attn.{part}" for part in ("bias", "masked_bias")]),
            ("rmt_gpt2_wrap", [f"memory_cell.model.transformer.h.1.attn.{part}" for part in ("bias", "masked_bias")]),
            (
                "armt_neox",
                [
                    f"memory_cell.model.gpt_neox.layers.0.layer.attention.{part}"
                    for part in ("bias", "masked_bias", "rotary_emb.inv_freq")
                ],
            ),
        ],
    )
    def test_buffers_of_old_transformers_are_left_out(
        self, make_case: Callable[[str], Case], name: str, buffers: list[str]
    ) -> None:
        case = make_case(name)
        names = hf_names(case)
        case.tensors |= {buffer: torch.ones(1) for buffer in buffers}
        conversion = case.convert()
        assert equal(case.result(), names)
        assert set(buffers) <= set(conversion.left_out)

    def test_a_directory(self, tied: Case) -> None:
        tied.save()
        tied.convert(tied.folder)
        assert equal(tied.result(), hf_names(tied))

    def test_shards_with_an_index(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        tied.convert(tmp_path)
        assert equal(tied.result(), hf_names(tied))


class TestDirectory:
    def test_config_says_what_the_checkpoint_does_not(self, tied: Case) -> None:
        tied.args |= {"correction": False}
        conversion = tied.convert()
        config = json.loads((tied.dst / "config.json").read_text())
        said = {name: config[name] for name in ("segment_size", "num_mem_tokens", "d_mem", "variant", "correction")}
        assert said == {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8, "variant": "v1", "correction": False}
        assert config["generation_policy"] == "open"
        assert conversion.assumed == {"use_denom": True, "segment_alignment": "left", "generation_policy": "open"}

    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            ("prmt_gpt2_wrap", {"aliased": True}),
            ("rmt_gpt2_wrap", {"sliding_window": False}),
            ("armtv2_gpt2_nowrap", {"learned_positions": "restart"}),
            ("rmt_llama", {}),
        ],
    )
    def test_every_way_that_was_assumed_is_told(
        self, make_case: Callable[[str], Case], name: str, ways: dict[str, object]
    ) -> None:
        case = make_case(name)
        assumed = case.convert().assumed
        names = ("aliased", "sliding_window", "learned_positions", "generation_policy")
        assert {name: assumed[name] for name in names if name in assumed} == ways | {"generation_policy": "open"}

    def test_generation_policy_can_be_chosen(self, tied: Case) -> None:
        assert "generation_policy" not in tied.convert(generation_policy="commit").assumed
        assert json.loads((tied.dst / "config.json").read_text())["generation_policy"] == "commit"

    def test_an_explicit_value_wins_over_the_file(self, tied: Case) -> None:
        tied.given = {"segment_size": 32, "variant": "v2", "use_denom": False, "segment_alignment": "right"}
        conversion = tied.convert()
        config = conversion.config
        assert (config.segment_size, config.variant, config.use_denom) == (32, "v2", False)
        assert config.segment_alignment == "right"
        assert conversion.assumed == {"generation_policy": "open"}

    def test_no_path_of_this_machine_is_written(self, case: Case) -> None:
        case.convert()
        assert str(case.base_config) not in (case.dst / "config.json").read_text()

    def test_weights_are_marked_as_torch_tensors(self, tied: Case) -> None:
        tied.convert()
        with safe_open(tied.dst / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_a_memory_in_another_dtype_keeps_it(self, case: Case) -> None:
        case.tensors = {
            key: value if key.endswith("memory") or ".W_m" in key else value.to(torch.bfloat16)
            for key, value in case.tensors.items()
        }
        config = case.convert().config
        assert (config.model_dtype, config.memory_dtype) == ("bfloat16", "float32")
        loaded = AutoModelForCausalLM.from_pretrained(case.dst)
        assert {p.dtype for name, p in loaded.named_parameters() if name.endswith("memory")} == {torch.float32}
        assert loaded.model.dtype == torch.bfloat16

    def test_mixed_dtypes_are_widened(self, tied: Case) -> None:
        key = LAYERS + "0.layer.mlp.up_proj.weight"
        tied.tensors[key] = tied.tensors[key].to(torch.bfloat16)
        tied.convert()
        widened = tied.result()["model.model.layers.0.layer.mlp.up_proj.weight"]
        assert torch.equal(widened, tied.tensors[key].float())

    def test_the_tokenizer_beside_the_checkpoint_is_copied(self, tied: Case) -> None:
        (tied.folder / "tokenizer.json").write_text("{}")
        (tied.folder / "chat_template.jinja").write_text("template")
        assert tied.convert().tokenizer == tied.folder
        assert (tied.dst / "tokenizer.json").read_text() == "{}"
        assert (tied.dst / "chat_template.jinja").read_text() == "template"

    def test_a_named_tokenizer_is_preferred(self, tied: Case, tmp_path: Path) -> None:
        (tied.folder / "tokenizer.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text('{"named": 1}')
        assert tied.convert(tokenizer=tmp_path).tokenizer == tmp_path
        assert (tied.dst / "tokenizer.json").read_text() == '{"named": 1}'

    def test_the_base_models_generation_config_is_taken_over(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text((case.golden.path / "base_config" / "config.json").read_text())
        GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
        case.base_config = tmp_path
        case.convert()
        assert GenerationConfig.from_pretrained(case.dst).eos_token_id == [7, 8]

    def test_it_may_be_an_empty_directory(self, tied: Case) -> None:
        tied.dst.mkdir()
        tied.convert()
        assert tied.result()
