"""Whose memories they are: what a checkpoint tells, and the models that a folder of memories knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.memory_store import MODEL, OTHER_MODEL, flip, folder, open_store
from vllm_armt.memories.checkpoint import DIGESTS, checkpoint_identity, fingerprint_of, introduce, known_models
from vllm_armt.memories.errors import Damaged


def checkpoint(directory: Path, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "armt", "segment_size": 4} | config))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_a_checkpoint_is_known_again_by_its_weights_and_what_matters_of_its_config(tmp_path: Path) -> None:
    one = checkpoint_identity(checkpoint(tmp_path / "one"), tmp_path)
    copied = checkpoint(tmp_path / "two", max_context=5, transformers_version="1", architectures=["X"])
    assert checkpoint_identity(copied, tmp_path) == one
    assert fingerprint_of(one) == fingerprint_of(dict(reversed(one.items())))
    smaller = checkpoint_identity(checkpoint(tmp_path / "three", segment_size=2), tmp_path)
    assert (smaller["weights"], smaller["config"] == one["config"]) == (one["weights"], False)
    assert checkpoint_identity(copied, tmp_path, {"n_heads": 2})["config"] != one["config"]
    (copied / "model.safetensors").write_bytes(b"others")
    assert checkpoint_identity(copied, tmp_path)["weights"] != one["weights"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        checkpoint_identity(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint_identity(tmp_path, tmp_path)
    assert not (tmp_path / DIGESTS).exists()


def test_a_folder_knows_the_models_that_were_introduced_to_it(tmp_path: Path) -> None:
    assert known_models(tmp_path) == []
    for model in (MODEL, OTHER_MODEL):
        introduce(open_store(tmp_path, model))
    open_store(tmp_path, MODEL)
    assert known_models(tmp_path) == [OTHER_MODEL, MODEL]


def test_what_is_damaged_is_said_and_written_again_by_the_next_server(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    introduce(store)
    file = folder(store) / "model.json"
    before = file.stat().st_mtime_ns
    introduce(store)
    assert file.stat().st_mtime_ns == before
    flip(file, 100)
    with pytest.raises(Damaged, match="checksum"):
        known_models(tmp_path)
    introduce(store)
    assert known_models(tmp_path) == [MODEL]
    file.rename(folder(open_store(tmp_path, OTHER_MODEL)) / "model.json")
    with pytest.raises(Damaged, match="is not at its place"):
        known_models(tmp_path)
