"""README's table of published checkpoints, line by line, on tiny tensors of the same layout.

The files themselves are not to be had where tests run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from tests.support.golden_cases import ROOT, Golden
from tests.support.published import Hub, assert_computes
from tests.support.research_checkpoint import Case
from tests.support.spellings import torch_save
from vllm_armt.checkpoints import WrapperArgs, convert
from vllm_armt.hf import ARMTForCausalLM

LLAMA, GPT2 = "meta-llama/Llama-3.2-1B", "openai-community/gpt2"
RUN_20 = Golden("il08_llama_sw_sink_run20")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "dst"


def run_20_config(base: str, **changes: Any) -> dict[str, Any]:
    """As published: keys of il08, the base model by its name, and the Python file named."""
    auto_map = {"AutoModelForCausalLM": "modeling_armt.InnerLoopARMTForCausalLM"}
    written = json.loads((RUN_20.path / "config.json").read_text())
    return written | {"auto_map": auto_map, "base_model_name": base} | changes


class TestSevenFilesWithoutAConfig:
    """irodkin/ARMT-llama3.2-1B: float32 pickles of the wrapper's state dict, each with every name."""

    NAME = "irodkin/ARMT-llama3.2-1B"

    @pytest.fixture
    def case(self, hub: Hub, tmp_path: Path) -> Case:
        case = Case("armtv2_llama", tmp_path)
        weights = torch_save(case, tmp_path)
        hub.add(self.NAME, step19500__bin=weights, ctx2048_prolong__bin=weights)
        hub.add_base(LLAMA, "armtv2_llama")
        return case

    def test_one_has_to_be_named(self, hub: Hub, case: Case, dst: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"but ctx2048_prolong\.bin, step19500\.bin\. Name one: irodkin/ARMT"
        ):
            convert(self.NAME, dst, LLAMA)
        assert not any(name.endswith(".bin") for name in hub.fetched)

    def test_what_its_name_says_is_offered_and_not_taken(self, case: Case, dst: Path) -> None:
        with pytest.raises(
            ValueError, match=r"`segment_size` is not.*has 'ctx2048' in it, which may mean --segment-size"
        ):
            convert(f"{self.NAME}/ctx2048_prolong.bin", dst, LLAMA, WrapperArgs({"variant": "v2"}))
        assert not dst.exists()

    def test_a_window_that_only_the_name_tells_of_is_asked_for(self, hub: Hub, case: Case, dst: Path) -> None:
        (hub.folder / "repositories" / self.NAME / "step19500.bin").rename(
            hub.folder / "repositories" / self.NAME / "sliding_ctx512x4.bin"
        )
        src, args = f"{self.NAME}/sliding_ctx512x4.bin", {"segment_size": 16, "variant": "v2"}
        with pytest.raises(ValueError, match=r"has 'sliding' in it.*--no-sliding-window"):
            convert(src, dst, LLAMA, WrapperArgs(args))
        with pytest.raises(ValueError, match="`sliding_window` is true"):
            convert(src, dst, LLAMA, WrapperArgs(args | {"sliding_window": True}))
        convert(src, dst, LLAMA, WrapperArgs(args | {"sliding_window": False}))

    def test_it_opens_with_s_and_the_variant_given(self, hub: Hub, case: Case, dst: Path) -> None:
        args = WrapperArgs({"segment_size": 16, "variant": "v2"})
        made = convert(f"{self.NAME}/step19500.bin", dst, LLAMA, args)
        assert (made.config.num_mem_tokens, made.config.d_mem) == (4, 8)
        assert made.tokenizer is not None
        assert (dst / "tokenizer.json").exists()
        assert_computes(dst, case.golden)
        assert f"{LLAMA}/model.safetensors" not in hub.fetched


def test_babilong_qa_is_a_gpt2_without_a_config(hub: Hub, dst: Path) -> None:
    """irodkin/armt_babilong_qa1 to qa4: pytorch_model.bin alone."""
    golden = Golden("armt_gpt2_wrap")
    hub.add("irodkin/armt_babilong_qa1", pytorch_model__bin=golden.checkpoint)
    hub.add_base(GPT2, golden.name)
    with pytest.raises(ValueError, match=r"does not say what its base model is.*--base-config PATH or OWNER/NAME"):
        convert("irodkin/armt_babilong_qa1", dst)
    convert("irodkin/armt_babilong_qa1", dst, GPT2, WrapperArgs({"segment_size": 16, "variant": "v1"}))
    assert_computes(dst, golden)


class TestLoraThatIsNotMerged:
    """booydar/RMT-Llama-3.2-1B-Instruct-8x1024-mem16-lora-babilong-qa1-5: an ARMT in spite of its name."""

    NAME = "booydar/RMT-Llama-3.2-1B-Instruct-8x1024-mem16-lora-babilong-qa1-5"
    CONFIG = {"max_n_segments": 8, "segment_alignment": "left", "segment_size": 16, "k2": -1, "vary_n_segments": True}  # noqa: RUF012

    @pytest.fixture
    def golden(self, hub: Hub) -> Golden:
        golden = Golden("armt_llama_lora")
        hub.add_base(LLAMA, golden.name)
        return golden

    def test_the_arguments_in_its_config_are_used(self, hub: Hub, golden: Golden, dst: Path) -> None:
        assert len(json.dumps(self.CONFIG)) < 130
        hub.add(self.NAME, model__safetensors=golden.checkpoint, config__json=self.CONFIG)
        made = convert(self.NAME, dst, LLAMA, WrapperArgs({"variant": "v1"}, lora_alpha=32))
        assert (made.config.model_type, made.config.segment_size) == ("armt", 16)
        assert_computes(dst, golden)

    def test_what_is_not_in_there_is_asked_for(self, hub: Hub, golden: Golden, dst: Path) -> None:
        hub.add(self.NAME, model__safetensors=golden.checkpoint, config__json={"max_n_segments": 8})
        with pytest.raises(ValueError, match=r"their scale is not in it\..*--lora-alpha"):
            convert(self.NAME, dst, LLAMA, WrapperArgs({"variant": "v1"}))
        with pytest.raises(
            ValueError, match=r"'8x1024' in it, .*--segment-size 1024 \(or 1008, if those count its 16 mem"
        ):
            convert(self.NAME, dst, LLAMA, WrapperArgs({"variant": "v1"}, lora_alpha=32))

    def test_arguments_that_are_not_known_are_refused(self, hub: Hub, golden: Golden, dst: Path) -> None:
        hub.add(self.NAME, model__safetensors=golden.checkpoint, config__json=self.CONFIG | {"memory_gate": True})
        with pytest.raises(ValueError, match=r"config\.json: unknown arguments memory_gate.*--wrapper-args FILE"):
            convert(self.NAME, dst, LLAMA, WrapperArgs({"variant": "v1"}, lora_alpha=32))


def test_an_rmt_with_25_bytes_of_config(hub: Hub, dst: Path) -> None:
    """AIRI-NLP/RMT-Llama-3.2-1B-2x1024-mem16-pg19: S stands in the name alone."""
    name, golden, config = (
        "AIRI-NLP/RMT-Llama-3.2-1B-2x1024-mem16-pg19",
        Golden("rmt_llama"),
        b'{\n  "max_n_segments": 2\n}',
    )
    assert len(config) == 25
    hub.add(name, model__safetensors=golden.checkpoint, config__json=config)
    hub.add_base(LLAMA, golden.name)
    with pytest.raises(ValueError, match=r"'2x1024' in it, which may mean --segment-size 1024 \(or 1008"):
        convert(name, dst, LLAMA)
    made = convert(name, dst, LLAMA, WrapperArgs({"segment_size": 16}))
    assert made.config.model_type == "rmt"
    assert_computes(dst, golden)


class TestRun20:
    """irodkin/InnerLoopARMTForCausalLM_run_20: il08 with a window and a sink, its base model by name."""

    @pytest.fixture
    def base(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """The base model's name, which leads transformers to a folder as well."""
        monkeypatch.chdir(tmp_path)
        Path(LLAMA).mkdir(parents=True)
        (Path(LLAMA) / "config.json").write_text((RUN_20.path / "base_config" / "config.json").read_text())
        return LLAMA

    def directory(self, folder: Path, base: str, **changes: Any) -> Path:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(RUN_20.checkpoint.read_bytes())
        (folder / "config.json").write_text(json.dumps(run_20_config(base, **changes)))
        return folder

    def test_it_opens_as_it_is(self, tmp_path: Path, base: str) -> None:
        assert_computes(self.directory(tmp_path / "run_20", base), RUN_20)

    def test_where_its_base_model_cannot_be_fetched_a_sentence_says_what_to_do(self, tmp_path: Path) -> None:
        directory = self.directory(tmp_path / "run_20", "owner/absent")
        with pytest.raises(
            ValueError, match=r"`base_model_name` is 'owner/absent'.*convert SRC DST --base-config"
        ) as told:
            AutoConfig.from_pretrained(directory)
        assert len(str(told.value).splitlines()) == 1

    def test_converted_it_needs_no_hub(self, hub: Hub, dst: Path) -> None:
        name = "irodkin/InnerLoopARMTForCausalLM_run_20"
        hub.add(name, model__safetensors=RUN_20.checkpoint, config__json=run_20_config(LLAMA))
        hub.add_base(LLAMA, RUN_20.name)
        made = convert(name, dst)
        assert (made.config.model_type, made.config.window, made.config.base_model_name) == ("armt_sw", "rows", None)
        assert (dst / "tokenizer.json").exists()
        assert_computes(dst, RUN_20)

    def test_missing_tensors_are_named(self, tmp_path: Path, base: str) -> None:
        with pytest.raises(ValueError, match="model of its config\\.json does not: sink"):
            AutoModelForCausalLM.from_pretrained(self.directory(tmp_path / "run_20", base, use_sink=False))


def test_run_34_is_an_armt_around_a_gemma_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """irodkin/InnerLoopARMTForCausalLM_run_34: old, without a window, trained with flash attention."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
    }
    base = Gemma3TextConfig(**sizes, hidden_size=32, intermediate_size=48, sliding_window=512)
    directory = Path("google/gemma-3-1b-it")
    base.save_pretrained(directory)
    config = json.loads((ROOT / "version_configs" / "run34_form.json").read_text())
    assert config["base_model_name"] == str(directory)
    run_34 = tmp_path / "run_34"
    made = AutoModelForCausalLM.from_config(base, dtype=torch.bfloat16)
    own = {name: config[name] for name in ("segment_size", "num_mem_tokens", "d_mem")}
    trained = ARMTForCausalLM.from_base(made, **own)
    trained.save_pretrained(run_34)
    (run_34 / "config.json").write_text(json.dumps(config))
    opened = AutoModelForCausalLM.from_pretrained(run_34)
    assert (type(opened), opened.config.memory_attention) == (ARMTForCausalLM, "causal")
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"architectures": ["ThinkingARMTForCausalLM"]}, "of a ThinkingARMTForCausalLM"),
        ({"auto_map": None}, "--code-version il08"),
    ],
)
def test_smollm2_opens_if_its_config_is_of_a_known_version(
    changes: dict[str, Any], sentence: str | None, tmp_path: Path, hub: Hub, dst: Path
) -> None:
    """irodkin/ARMT-SmolLM2-360m-8x1024: custom code, and a config.json that nobody here has seen."""
    golden, name = Golden("il08_llama_plain"), "irodkin/ARMT-SmolLM2-360m-8x1024"
    config = json.loads((golden.path / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "modeling_armt.ARMTConfig"}
    }
    hub.add(name, model__safetensors=golden.checkpoint, config__json=config | {"base_model_name": LLAMA} | changes)
    hub.add_base(LLAMA, golden.name)
    if sentence is None:
        convert(name, dst)
        assert_computes(dst, golden)
    else:
        with pytest.raises(ValueError, match=sentence):
            convert(name, dst)


def test_a_name_that_cannot_be_fetched_is_one_sentence(hub: Hub, dst: Path) -> None:
    for src, base in (("owner/absent", None), ("owner/absent/step1.bin", None), (str(RUN_20.path), "owner/absent")):
        with pytest.raises(
            FileNotFoundError, match=r"There is no owner/absent.* can't be fetched from the Hugg"
        ) as told:
            convert(src, dst, base, code_version="il08" if base else None)
        assert len(str(told.value).splitlines()) == 1
