"""Whose memories they are: everything that a page depends on changes the fingerprint, and nothing else does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.configs import config
from vllm_armt.config import ARMTSWConfig, RecurrentConfig
from vllm_armt.memories import checkpoint
from vllm_armt.memories.checkpoint import DIGESTS, weights_digest
from vllm_armt.memories.disk.manifest import Model
from vllm_armt.memories.identity import identify


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config().to_dict(), default=str))
    save_file({"a": torch.ones(4)}, directory / "model-1.safetensors")
    save_file({"b": torch.ones(4)}, directory / "model-2.safetensors")
    age(directory)
    return directory


def age(directory: Path) -> None:
    """Make weights look as if they had been there for long."""
    for file in directory.glob("*.safetensors"):
        os.utime(file, ns=(10**18 + 1, 10**18 + file.stat().st_size))


def vllm_config(
    model: Path,
    dtype: torch.dtype = torch.float32,
    overrides: Any = None,
    load_format: str = "auto",
    opened: RecurrentConfig | None = None,
) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            dtype=dtype,
            hf_config=opened or config(),
            hf_overrides={} if overrides is None else overrides,
            served_model_name="name",
            revision=None,
        ),
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
    )


def change_config(model: Path, **fields: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def same(model: Path, tmp_path: Path) -> Callable[..., bool]:
    """Whether a model has the fingerprint that it began with."""
    folder = tmp_path / "memories"
    before = identify(vllm_config(model), folder)

    def is_same(**changes: Any) -> bool:
        return identify(vllm_config(model, **changes), folder).fingerprint == before.fingerprint

    return is_same


def test_the_same_model_is_known_again_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    first = identify(vllm_config(model), tmp_path / "one")
    moved = model.rename(tmp_path / "moved")
    second = identify(vllm_config(moved), tmp_path / "two")
    assert first == second
    assert isinstance(first, Model)
    assert first.name == "name"
    assert first.identity["dtype"] == "float32"


def test_what_a_page_depends_on_changes_the_fingerprint(model: Path, same: Callable[..., bool]) -> None:
    assert same()
    assert not same(dtype=torch.bfloat16)
    assert not same(overrides={"generation_policy": "open"})
    assert not same(load_format="dummy")
    change_config(model, num_mem_tokens=5)
    assert not same()


def test_how_a_config_json_is_read_changes_it_too(same: Callable[..., bool]) -> None:
    """One of an older version says so by keys of its own, and may name its base model only."""
    by_rows = {"window_edge": "rows", "window_positions": "grow", "memory_attention": "full"}
    assert same(opened=config(memory_attention="causal"))
    assert not same(opened=config(memory_attention="full"))
    assert not same(opened=config(system=ARMTSWConfig, **by_rows))
    named = config(base_model_name="meta-llama/Llama-3.2-1B")
    assert not same(opened=named)


@pytest.mark.parametrize("name", ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"])
def test_other_weights_are_another_model(model: Path, name: str, same: Callable[..., bool]) -> None:
    save_file({"a": torch.zeros(4)}, model / name)
    assert not same()


def test_what_no_page_depends_on_does_not(model: Path, same: Callable[..., bool]) -> None:
    change_config(model, transformers_version="9", max_context=5, architectures=["Other"])
    (model / "README.md").write_text("words")
    assert same()


def test_overrides_that_can_not_be_compared_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give an object"):
        identify(vllm_config(model, overrides=lambda config: config), tmp_path / "memories")


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        weights_digest(tmp_path, tmp_path / DIGESTS)


def test_weights_are_hashed_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, hashed = tmp_path / DIGESTS, []
    file_digest = checkpoint.hashlib.file_digest

    def count(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return file_digest(file, name)

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", count)
    digest = weights_digest(model, known)
    assert sorted(hashed) == ["model-1.safetensors", "model-2.safetensors"]
    assert weights_digest(model, known) == digest
    assert len(hashed) == 2
    # files that were changed just now may change once more within one tick of the clock
    save_file({"a": torch.zeros(4)}, model / "model-1.safetensors")
    for _ in range(2):
        assert weights_digest(model, known) != digest
    assert hashed[2:] == ["model-1.safetensors"] * 2
    known.write_text("damaged")
    age(model)
    assert weights_digest(model, known) != digest


def test_a_folder_that_can_not_be_written_costs_a_hash_a_start(model: Path, tmp_path: Path) -> None:
    known = tmp_path / "nowhere" / DIGESTS
    assert weights_digest(model, known) == weights_digest(model, tmp_path / DIGESTS)
