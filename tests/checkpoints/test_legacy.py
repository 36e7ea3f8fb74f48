"""Checkpoints of the second generation: a config.json of its time is rewritten, or read for its arguments."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.golden_cases import ROOT
from tests.support.research_checkpoint import Case
from vllm_armt.checkpoints import WrapperArgs, convert

GOLDEN = ROOT / "armt_sw_llama"
OFF: dict[str, Any] = {
    "act_on": False,
    "act_type": "layer",
    "attend_to_previous_input": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM"},
    "constant_depth": False,
    "gating": False,
    "max_hop": 4,
    "n_heads": 1,
    "noisy_halting": False,
    "time_penalty": 0.0,
    "wrap_pos": False,
}
"""What a config.json of that code has beside today's fields."""


def write(folder: Path, **changes: Any) -> Path:
    """The sliding-window golden as the second-generation code would have saved it."""
    config = json.loads((GOLDEN / "config.json").read_text()) | OFF
    config |= {
        "model_type": "armt",
        "architectures": ["InnerLoopARMTForCausalLM"],
        "sliding_window_enabled": True,
    } | changes
    del config["model_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "generation_config.json"):
        shutil.copy(GOLDEN / name, folder)
    return folder


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def test_a_sliding_window_becomes_a_system_of_its_own(src: Path) -> None:
    (write(src) / "tokenizer.json").write_text("{}")
    dst = src.parent / "dst"
    conversion = convert(src, dst)
    model, report = AutoModelForCausalLM.from_pretrained(dst, output_loading_info=True)
    today = AutoModelForCausalLM.from_pretrained(GOLDEN)
    assert not any(report.values())
    assert type(model) is type(today)
    assert model.config.to_dict() | {"_name_or_path": str(GOLDEN)} == today.config.to_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in today.state_dict().items())
    assert load_file(dst / "model.safetensors").keys() == load_file(GOLDEN / "model.safetensors").keys()
    assert (conversion.tokenizer, conversion.assumed, conversion.left_out) == (src, {}, [])


def test_options_of_ours_can_be_added(src: Path) -> None:
    write(src)
    assert convert(src, src.parent / "dst", state_dtype="bfloat16").config.state_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_on": True}, "`act_on` is True"),
        ({"attend_to_previous_input": True}, "`attend_to_previous_input` is True"),
        ({"gating": True}, "no gating"),
        ({"n_heads": 2}, "one memory head"),
        ({"wrap_layers": [True, False, True]}, "`wrap_layers` leaves layers out"),
        ({"segment_alignment": "right"}, "Only generation_policy 'open'"),
        ({"sliding_window_enabled": False}, "with anything but flash attention that code has no causal mask"),
        ({"sliding_window_enabled": False, "attn_implementation": "flash_attention_2", "act_on": True}, "`act_on` is"),
        ({"model_type": "llama"}, "no checkpoint of the authors' code"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(src: Path, changes: dict[str, Any], message: str) -> None:
    write(src, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(src, src.parent / "dst")
    assert not (src.parent / "dst").exists()


def test_it_takes_no_arguments(src: Path) -> None:
    write(src)
    with pytest.raises(ValueError, match=r"config\.json says what the model is"):
        convert(src, src.parent / "dst", args=WrapperArgs({"segment_size": 16}))


def test_missing_weights_are_named(src: Path) -> None:
    write(src, use_sink=False)
    with pytest.raises(ValueError, match="Unexpected tensor 'sink'"):
        convert(src, src.parent / "dst")


def test_the_wrappers_arguments_are_read_from_a_config_json_beside_it(tied: Case) -> None:
    fields = {"segment_size": 24, "num_mem_tokens": 4, "d_mem": 8, "correction": False, "use_denom": True}
    outer = {"model_type": "armt", "architectures": ["ARMTForCausalLM"], "freeze_mem": False, "sliding_window": False}
    config = OFF | fields | outer
    (tied.folder / "config.json").write_text(json.dumps(config))
    tied.tensors = {"armt." + key: tensor for key, tensor in tied.tensors.items()}
    args = WrapperArgs.resolve(tied.folder / "config.json")
    made = convert(tied.save(), tied.dst, tied.base_config, args).config
    assert {name: getattr(made, name) for name in fields} == fields
    assert (made.variant, made.generation_policy, made.learned_positions) == ("v2", "open", "restart")
