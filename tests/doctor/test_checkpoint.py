"""What is said of a directory that is to be served: every reason why it is not, at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden_cases import ALL, HF, Golden
from tests.support.strangers import Stranger
from vllm_armt.doctor.checkpoint import checkpoint
from vllm_armt.doctor.machine import folders
from vllm_armt.doctor.served import served


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Stranger.make(tmp_path_factory.mktemp("whole")).folder


@pytest.fixture
def ours(whole: Path, tmp_path: Path) -> Path:
    """The directory of a tiny ARMT."""
    return shutil.copytree(whole / "ours", tmp_path / "ours")


def wrong(directory: Path) -> list[str]:
    """What is wrong with it, where something is."""
    found, config = checkpoint(directory)
    reasons = [finding.said for finding in found if finding.state == "wrong"]
    assert (config is None) == bool(reasons)
    return reasons


def change(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_whole_one_is_described(ours: Path) -> None:
    found, config = checkpoint(ours)
    assert config is not None
    assert {finding.about: finding.said for finding in found} == {
        "config.json": "armt on llama, 2 layers of width 8, S 4, m 2, d_mem 2, v2, generation policy commit, float32.",
        "weights": "32 tensors, 0.00 million numbers, all finite, 0.0 MB.",
        "tokenizer": "There is none: serve with --skip-tokenizer-init, and send token ids.",
    }


@pytest.mark.parametrize("golden", ALL, ids=lambda golden: golden.name)
def test_every_golden_is_whole(golden: Golden, golden_directory) -> None:
    assert wrong(golden_directory(golden)) == []


def test_it_is_said_what_it_is_served_as(tmp_path: Path) -> None:
    HF[0].copy_checkpoint(tmp_path / "golden")
    found = {finding.about: finding for finding in served(tmp_path / "golden")}
    assert "ARMTForCausalLM in bfloat16, schedule auto, texts of up to 1,048,576 tokens" in found["served as"].said
    assert "sdpa" in found["attention"].said
    # 3 pages of 3 layers of 12,544 bytes: M and z in float32, 48 rows of 64 and of 1
    assert found["memory"].said.startswith("A request takes 0.11 MB, however long its text is; ")
    assert found["memory"].state == "ok"


def test_every_reason_of_config_and_weights_is_said_at_once(ours: Path) -> None:
    tensors = load_file(ours / "model.safetensors")
    del tensors["model.model.layers.1.layer.mlp.up_proj.weight"]
    tensors["memory"][0, 0] = torch.nan
    tensors["extra"] = torch.ones(1)
    save_file(tensors, ours / "model.safetensors")
    reasons = wrong(ours)
    assert [reason.partition(" tensor ")[0] for reason in reasons[:2]] == ["Missing", "Unexpected"]
    assert "Tensor 'memory' holds NaN or infinity" in reasons[2]
    change(ours, correction="false", foo=1, segment_size=0)
    reasons = wrong(ours)
    assert [reason.partition(" ")[0] for reason in reasons[:3]] == ["`correction`", "config.json", "`segment_size`"]
    assert ["Tensor 'memory' holds NaN or infinity" in reason for reason in reasons[3:]] == [True]


def test_a_file_that_vllm_would_take_for_weights_is_named(ours: Path) -> None:
    save_file({"a": torch.ones(1)}, ours / "golden.safetensors")
    assert wrong(ours)[0].startswith("Beside model.safetensors there is golden.safetensors: vLLM takes every")


def test_other_directories_are_sent_where_they_belong(whole: Path, tmp_path: Path) -> None:
    assert f"`vllm-armt init {whole / 'base'} DST`" in wrong(whole / "base")[0]
    assert wrong(whole / "research")[0].endswith(
        f"Its weights are of the research code: vllm-armt convert {whole / 'research'} DST."
    )
    assert wrong(tmp_path)[0] == f"{tmp_path / 'config.json'} does not exist."
    assert wrong(tmp_path)[1].startswith(f"{tmp_path} has none of model.safetensors, ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(ours: Path, name: str) -> None:
    (ours / name).unlink()
    os.mkfifo(ours / name)
    assert wrong(ours) == [f"{ours / name} is no regular file. Give a file, not a directory, pipe or device."]


def test_folders_that_cannot_be_written_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "not" / "there" / "yet"))
    (tmp_path / "file").write_text("")
    found = {finding.about: finding for finding in folders(tmp_path / "file" / "memories")}
    assert found["vLLM's cache"].state == "ok"
    assert (found["memories"].state, found["memories"].said) == (
        "wrong",
        f"{tmp_path / 'file'} can't be written: give another folder.",
    )
