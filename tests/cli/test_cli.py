"""The command line: what is printed, and with which code it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from golden_cases import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = ROOT / "armt_llama_gqa_tied"


def test_convert_summarises_what_it_wrote_and_assumed(run, tmp_path: Path) -> None:
    dst = tmp_path / "armt"
    code, out, _ = run(
        *("convert", GOLDEN, dst, "--base-config", GOLDEN / "base_config"),
        *("--wrapper-args", GOLDEN / "armt_args.json"),
    )
    assert code == 0
    assert "llama, 3 layers, float32" in out
    assert "segment_size 16, num_mem_tokens 4, d_mem 8" in out
    assert "variant v1, correction True, use_denom True, generation_policy open" in out
    assert "assumed, as the authors' constructor does: use_denom=True" in out
    assert out.splitlines()[-1] == f"Next: vllm serve {dst}"
    assert (dst / "model.safetensors").exists()


def test_convert_with_flags_alone(run, tmp_path: Path) -> None:
    code, _, _ = run(
        *("convert", GOLDEN, tmp_path / "armt", "--base-config", GOLDEN / "base_config"),
        *("--segment-size", 16, "--variant", "v2", "--no-correction", "--no-use-denom"),
        *("--generation-policy", "commit", "--state-dtype", "bfloat16"),
    )
    assert code == 0
    config = json.loads((tmp_path / "armt" / "config.json").read_text())
    assert (config["variant"], config["correction"], config["use_denom"]) == ("v2", False, False)
    assert (config["generation_policy"], config["state_dtype"]) == ("commit", "bfloat16")


def test_an_error_is_one_line_without_a_traceback(run, tmp_path: Path) -> None:
    code, out, err = run("convert", GOLDEN, tmp_path / "armt", "--base-config", GOLDEN / "base_config")
    assert code == 1
    assert out == ""
    assert err.startswith("error: `segment_size` is not in the checkpoint")
    assert len(err.splitlines()) == 1


def test_a_missing_file_is_an_error_too(run, tmp_path: Path) -> None:
    code, _, err = run(
        *("convert", tmp_path / "absent", tmp_path / "armt", "--base-config", GOLDEN / "base_config"),
        *("--wrapper-args", GOLDEN / "armt_args.json"),
    )
    assert code == 1
    assert "absent does not exist" in err


def test_wrong_usage_ends_with_2(run, tmp_path: Path) -> None:
    assert run("convert", GOLDEN, tmp_path, "--base-config", GOLDEN, "--variant", "v3")[0] == 2
    assert run("init", "base", tmp_path)[0] == 2


def test_init_writes_a_fresh_model(run, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(GOLDEN / "base_config")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    code, out, _ = run(
        *("init", tmp_path / "base", tmp_path / "armt"),
        *("--segment-size", 32, "--num-mem-tokens", 4, "--d-mem", 8, "--variant", "v1"),
    )
    assert code == 0
    assert "segment_size 32, num_mem_tokens 4, d_mem 8, variant v1" in out
    assert json.loads((tmp_path / "armt" / "config.json").read_text())["variant"] == "v1"


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    code = "import sys, vllm_armt.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
