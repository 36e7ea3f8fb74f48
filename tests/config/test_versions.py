"""Which version of the authors' code a config.json is of: told by its keys, by the Python file, or by who knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config

from tests.support.configs import GPT2_SIZES
from tests.support.golden_cases import HF, ROOT
from vllm_armt.config import ARMTConfig, ARMTSWConfig, Refused
from vllm_armt.config.code_beside import code_beside
from vllm_armt.config.versions import version_of
from vllm_armt.hf import MODELS

CONFIGS = ROOT / "version_configs"
IL08 = """
class InnerLoopARMTForCausalLM(PreTrainedModel):
    def augment_sequence(self, hidden_states, mem, sink=None): ...
"""
DISJOINT = """
class InnerLoopARMTForCausalLM(PreTrainedModel):
    def zero_mem(self): ...
"""
ONLINE = """
from fla.ops.delta_rule.chunk import chunk_delta_rule
class AssociativeLayerWrapper(torch.nn.Module): ...
"""
CAUSAL, FULL = "causal", "full"


def written(name: str) -> dict[str, Any]:
    """The config.json of a golden or of another version's model, around a base model that needs no hub."""
    folder = ROOT / name
    file = folder / "config.json" if folder.is_dir() else CONFIGS / f"{name}.json"
    raw = json.loads(file.read_text())
    if raw["base_model_name"]:
        base = json.loads((ROOT / "il08_llama_plain" / "base_config" / "config.json").read_text())
        raw |= {"base_model_name": None, "base_model_config": base}
    return raw


@pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
def test_what_the_newest_code_writes_is_todays(golden) -> None:
    assert version_of(json.loads((golden.path / "config.json").read_text())) == "today"


@pytest.mark.parametrize(
    ("name", "confirmed", "version"),
    [
        ("run20_form", None, "il08"),
        ("il08_llama_plain", "il08", "il08"),
        ("run34_form", None, "old"),
        ("old_llama_plain_fa2", "old", "old"),
        ("old_sink_no_window", "old", "old"),
        ("outer_llama", None, "outer_loop"),
        ("outer_sw", None, "outer_loop"),
        ("thinking_x1", None, "thinking"),
        ("thinking_x2_x3", None, "thinking"),
        ("thinking_repeat", None, "thinking"),
        ("memparams_frozen_base", None, "memory_params"),
        ("memparams_sw_sink", None, "memory_params"),
    ],
)
def test_keys_tell_the_version(name: str, confirmed: Any, version: str) -> None:
    assert version_of(written(name), confirmed=confirmed) == version


@pytest.mark.parametrize(
    ("name", "system", "memory_attention", "window", "shift", "sink"),
    [
        ("run20_form", ARMTSWConfig, FULL, "rows", 14, True),
        ("run34_form", ARMTConfig, CAUSAL, None, 0, False),
    ],
)
def test_an_older_version_opens_as_what_it_is_today(
    name: str, system: Any, memory_attention: str, window: str | None, shift: int, sink: bool
) -> None:
    opened = ARMTConfig.from_dict(written(name))
    assert (type(opened), opened.architectures) == (system, [system.architecture])
    assert (opened.memory_attention, opened.window, opened.window_shift) == (memory_attention, window, shift)
    assert (opened.use_sink, opened.generation_policy) == (sink, "commit")
    # and stays so once it is written
    again = ARMTConfig.from_dict(opened.to_dict())
    assert again.to_dict() == opened.to_dict()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("thinking_x1", r"of a ThinkingARMTForCausalLM .*other mathematics.*authors' code"),
        ("memparams_sw_sink", r"of a MemoryParamsARMTForCausalLM .*other mathematics"),
        ("disjoint_sw_sink", r"inner_loop\.py \(il08\) or of modeling_amt/disjoint_memory\.py.*--code-version il08"),
        ("il08_llama_plain", r"inner_loop\.py \(il08\) or of modeling_amt/disjoint_memory\.py.*--code-version il08"),
        ("old_llama_plain_fa2", r"`attn_implementation` is None.*no causal mask.*--code-version old"),
        ("outer_llama", r"have other names \(armt\.memory_cell\.\*\): vllm-armt convert SRC DST"),
        ("outer_act", r"have other names|`act_on` is True"),
    ],
)
def test_what_is_not_known_or_not_supported_is_refused_by_name(name: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        ARMTConfig.from_dict(written(name))


@pytest.mark.parametrize(
    "attention", ["sdpa", "eager", "flex_attention", None, 3, "flash_attention_2", "flash_attention_3"]
)
def test_without_a_window_old_is_causal_with_flash_attention_alone(attention: Any) -> None:
    raw = written("old_sink_no_window") | {"attn_implementation": attention}
    if str(attention).startswith("flash"):
        assert ARMTConfig.from_dict(raw).use_sink
    else:
        with pytest.raises(Refused, match="no causal mask"):
            ARMTConfig.from_dict(raw)
    assert isinstance(ARMTConfig.from_dict(raw | {"sliding_window_enabled": True}), ARMTSWConfig)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (IL08, "il08"),
        (DISJOINT, "disjoint_memory"),
        (ONLINE, "online_armt"),
        (IL08 + ONLINE, None),
        ("class Other: ...", None),
        ("raise SystemExit(1)\x00", None),
        ("(" * 10_000, None),
    ],
    ids=["il08", "disjoint", "online", "two", "none", "nul", "deep"],
)
def test_python_files_are_parsed_and_never_run(text: str, code: str | None, tmp_path: Path) -> None:
    (tmp_path / "modeling_armt.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + text)
    assert code_beside(tmp_path) == code
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "sentence"), [(IL08, None), (DISJOINT, "disjoint_memory.py or a first")], ids=["il08", "disjoint"]
)
def test_the_python_file_of_a_directory_decides_where_keys_do_not(
    text: str, sentence: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written("disjoint_sw_sink")))
    (tmp_path / "modeling_armt.py").write_text(text)
    assert "armt" in MODELS  # so that transformers knows it
    if sentence is None:
        assert AutoConfig.from_pretrained(tmp_path).memory_attention == "full"
    else:
        with pytest.raises(Refused, match=sentence):
            AutoConfig.from_pretrained(tmp_path)


def test_who_knows_is_not_heard_against_the_files() -> None:
    with pytest.raises(Refused, match="--code-version is 'old', but by its files the checkpoint is of version 'il08'"):
        version_of(written("run20_form"), confirmed="old")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_enabled": True},
        {"architectures": ["ARMTForCausalLM"], "sliding_window_enabled": False},
        {"architectures": ["OtherForCausalLM"]},
    ],
)
def test_keys_that_no_version_writes_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"no version that is known writes this\. Known are today, old, il08"):
        ARMTConfig.from_dict(written("run20_form") | changes)


def test_layers_without_a_wrapper_are_refused_in_an_older_version() -> None:
    with pytest.raises(Refused, match="`wrap_layers` leaves layers out"):
        ARMTConfig.from_dict(written("era_wrap_layers") | {"auto_map": {"AutoConfig": "modeling_armt.ARMTConfig"}})


def test_il08_around_a_base_model_with_learned_positions_is_refused() -> None:
    base = GPT2Config(**GPT2_SIZES, n_positions=128).to_dict()
    raw = written("run20_form") | {"sliding_window": False, "base_model_config": base, "layers_attr": None}
    with pytest.raises(Refused, match=r"around a gpt2, which has learned positions.*never run"):
        ARMTConfig.from_dict(raw)
