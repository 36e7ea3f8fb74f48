"""The command line: what is printed, and with which code it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.configs import config
from tests.support.golden_cases import ROOT, Golden
from vllm_armt import __version__
from vllm_armt.cli.summary import summary

GOLDEN = ROOT / "armt_llama_gqa_tied"


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(("wrapped", "said"), [(None, []), ([False, True, True], ["  memory in layers 1, 2 only"])])
def test_a_summary_says_which_layers_have_a_memory(wrapped: list[bool] | None, said: list[str]) -> None:
    lines = summary(config(wrap_layers=wrapped), Path("model"))
    assert [line for line in lines if "memory in" in line] == said


def write_base(name: str, directory: Path) -> None:
    """A random model of a golden's base."""
    config = AutoConfig.from_pretrained(ROOT / name / "base_config")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "armt_llama_gqa_tied",
            [
                "armt on llama, 3 layers, float32",
                "segment_size 16, num_mem_tokens 4, d_mem 8, n_heads 1, gating False",
                "variant v1, correction True, use_denom True, use_sink False, generation_policy open, segment_",
                "assumed, as the authors' code does: use_denom=True, segment_alignment=left, generation_policy=open\n",
                "left out, because it has no effect: nothing",
            ],
        ),
        (
            "prmt_gpt2_wrap",
            [
                "prmt on gpt2, 3 layers, float32",
                "segment_size 16, num_mem_tokens 4\n",
                "aliased True, generation_policy open, segment_alignment left",
                "wrap_pos True, learned_positions restart, sliding_window False",
                "assumed, as the authors' code does: segment_alignment=left, aliased=True, generation_policy=open\n",
                "left out, because it has no effect: memory_cell.memory\n",
            ],
        ),
        ("rmt_gpt2_wrap", ["rmt on gpt2, 3 layers", "wrap_pos True, learned_positions restart, sliding_window False"]),
        ("armt_neox", ["armt on gpt_neox, 3 layers"]),
    ],
)
def test_convert_summarises_what_it_wrote_and_assumed(run, tmp_path: Path, name: str, said: list[str]) -> None:
    golden, dst = ROOT / name, tmp_path / "dst"
    code, out, _ = run(
        *("convert", golden, dst, "--base-config", golden / "base_config"),
        *("--wrapper-args", golden / "armt_args.json"),
    )
    assert code == 0
    assert [line for line in said if line not in out] == []
    assert "tokenizer: none found; give --tokenizer DIR, or send token ids to /v1/completions: " in out
    assert out.splitlines()[-1] == f"Next: vllm serve {dst} --skip-tokenizer-init"
    assert (dst / "model.safetensors").exists()


def test_convert_with_flags_alone(run, tmp_path: Path) -> None:
    code, _, _ = run(
        *("convert", GOLDEN, tmp_path / "armt", "--base-config", GOLDEN / "base_config"),
        *("--system", "armt", "--segment-size", 16, "--variant", "v2", "--no-correction", "--no-use-denom"),
        *("--segment-alignment", "right", "--generation-policy", "open", "--state-dtype", "bfloat16"),
    )
    assert code == 0
    config = read_config(tmp_path / "armt")
    assert (config["variant"], config["correction"], config["use_denom"]) == ("v2", False, False)
    assert (config["segment_alignment"], config["generation_policy"]) == ("right", "open")
    assert config["state_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "flags", "field", "value"),
    [
        ("prmt_gpt2_wrap", ["--no-aliased"], "aliased", False),
        ("prmt_gpt2_wrap", ["--generation-policy", "commit"], "generation_policy", "commit"),
        ("rmt_gpt2_wrap", ["--sliding-window"], "sliding_window", True),
        ("rmt_llama", ["--system", "rmt"], "model_type", "rmt"),
    ],
)
def test_convert_of_other_systems(run, tmp_path: Path, name: str, flags: list[str], field: str, value: object) -> None:
    base = ROOT / name / "base_config"
    code, _, err = run("convert", ROOT / name, tmp_path / "dst", "--base-config", base, "--segment-size", 16, *flags)
    assert (code, read_config(tmp_path / "dst")[field]) == (0, value), err


def test_convert_checks_the_system(run, tmp_path: Path) -> None:
    code, _, err = run(
        *("convert", GOLDEN, tmp_path / "dst", "--base-config", GOLDEN / "base_config"),
        *("--segment-size", 16, "--system", "rmt"),
    )
    assert code == 1
    assert err == "error: `system` was given as 'rmt', but the checkpoint's tensors say 'armt'.\n"


def test_convert_of_the_second_generation_needs_no_options(run, tmp_path: Path) -> None:
    src = tmp_path / "src"
    Golden("armt_sw_llama").copy_checkpoint(src)
    older = {"model_type": "armt", "architectures": ["InnerLoopARMTForCausalLM"], "act_on": False}
    config = read_config(src) | older | {"sliding_window_enabled": True}
    (src / "config.json").write_text(json.dumps(config))
    code, out, _ = run("convert", src, tmp_path / "dst")
    assert code == 0
    assert "armt_sw on llama, 3 layers, float32" in out
    assert "use_sink True" in out
    assert read_config(tmp_path / "dst")["model_type"] == "armt_sw"


def test_with_a_tokenizer_the_next_command_is_vllms_own(run, tmp_path: Path) -> None:
    write_base("armt_llama_gqa_tied", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    words = ("init", tmp_path / "base", tmp_path / "dst", "--segment-size", 32, "--num-mem-tokens", 4, "--d-mem", 8)
    code, out, _ = run(*words)
    assert code == 0
    assert out.splitlines()[-1].endswith(f"or serve it: vllm serve {tmp_path / 'dst'}")
    (tmp_path / "base" / "tokenizer.json").unlink()
    code, out, _ = run(*(f"{word}2" if word == tmp_path / "dst" else word for word in words))
    assert out.splitlines()[-1].endswith(f"vllm serve {tmp_path / 'dst2'} --skip-tokenizer-init")


def test_the_version_and_help_of_every_command_are_at_hand(run) -> None:
    assert run("--version") == (0, f"vllm-armt {__version__}\n", "")
    for words in (["-h"], ["--help"], ["convert", "-h"], ["init", "-h"], ["bench", "-h"], ["memory", "-h"]):
        code, out, _ = run(*words)
        assert (code, out.startswith("Usage: ")) == (0, True), words


def test_an_error_of_several_lines_is_one(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect.\nCheck\n  your connection.")

    monkeypatch.setattr("vllm_armt.checkpoints.convert", fail)
    code, _, err = run("convert", GOLDEN, tmp_path / "armt")
    assert (code, err) == (1, "error: We couldn't connect. Check your connection.\n")


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


@pytest.mark.parametrize(
    ("name", "flags", "said", "fields"),
    [
        (
            "armt_llama_gqa_tied",
            ["--d-mem", 8, "--variant", "v1"],
            "armt on llama, 3 layers, float32",
            {"variant": "v1", "d_mem": 8, "generation_policy": "commit"},
        ),
        (
            "armt_neox",
            ["--d-mem", 8, "--n-heads", 2, "--gating"],
            "d_mem 8, n_heads 2, gating True",
            {"n_heads": 2, "gating": True},
        ),
        ("armt_qwen3", ["--system", "armt_sw", "--d-mem", 8, "--use-sink"], "use_sink True", {"use_sink": True}),
        (
            "prmt_gpt2_wrap",
            ["--system", "prmt", "--wrap-pos", "--no-aliased", "--generation-policy", "commit"],
            "wrap_pos True, learned_positions restart",
            {"aliased": False, "generation_policy": "commit"},
        ),
        (
            "rmt_gpt2_wrap",
            ["--system", "rmt", "--learned-positions", "grow"],
            "wrap_pos False, learned_positions grow",
            {"learned_positions": "grow", "generation_policy": "open"},
        ),
    ],
)
def test_init_writes_a_fresh_model(
    run, tmp_path: Path, name: str, flags: list[object], said: str, fields: dict[str, object]
) -> None:
    write_base(name, tmp_path / "base")
    code, out, err = run(
        *("init", tmp_path / "base", tmp_path / "dst", "--segment-size", 32, "--num-mem-tokens", 4), *flags
    )
    assert code == 0, err
    assert "segment_size 32, num_mem_tokens 4" in out
    assert said in out
    config = read_config(tmp_path / "dst")
    assert {field: config[field] for field in fields} == fields


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--system", "rmt", "--d-mem", 8],
            "System 'rmt' has no option `d_mem`, only armt, armt_sw have: leave it out.",
        ),
        ([], "System 'armt' needs `d_mem`, the width of memory queries and keys: give it."),
    ],
)
def test_init_says_what_the_system_has(run, tmp_path: Path, flags: list[object], message: str) -> None:
    code, _, err = run("init", "base", tmp_path / "dst", "--segment-size", 32, "--num-mem-tokens", 4, *flags)
    assert (code, err) == (1, f"error: {message}\n")


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    code = "import sys, vllm_armt.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
