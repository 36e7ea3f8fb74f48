"""The Hugging Face hub as a folder, with tiny repositories of the layouts that are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from tests.support.golden_cases import ROOT, Golden, relative_l2
from vllm_armt.checkpoints import hub


class Hub:
    """What `vllm_armt.checkpoints.hub` asks, answered from a folder of repositories.

    Args:
        folder: of the repositories, OWNER/NAME each, and of the cache that they are fetched into.
        monkeypatch: puts it in place of huggingface_hub.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        monkeypatch.setattr(hub, "snapshot_download", self._snapshot)
        monkeypatch.setattr(hub, "hf_hub_download", self._file)
        monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda _, name: self._files(name))

    def add(self, name: str, **files: Any) -> Path:
        """A repository of files by name (`__` for a dot): a path that is copied, an object for JSON, or bytes."""
        repository = self.folder / "repositories" / name
        repository.mkdir(parents=True)
        for key, content in files.items():
            target = repository / key.replace("__", ".")
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            elif isinstance(content, bytes):
                target.write_bytes(content)
            else:
                target.write_text(json.dumps(content))
        return repository

    def add_base(self, name: str, golden: str) -> Path:
        """The repository of a golden's base model: its config.json, a tokenizer, and weights that nobody needs."""
        config = ROOT / golden / "base_config" / "config.json"
        return self.add(name, config__json=config, tokenizer__json={}, model__safetensors=b"large")

    def _files(self, name: str) -> list[str]:
        repository = self.folder / "repositories" / name
        if not repository.is_dir():
            raise LocalEntryNotFoundError(f"{name} is not in the cache, and outgoing traffic is off.")
        return sorted(file.name for file in repository.iterdir())

    def _file(self, name: str, file: str) -> str:
        return str(Path(self._snapshot(name, [file])) / file)

    def _snapshot(self, name: str, allow_patterns: Sequence[str]) -> str:
        snapshot = self.folder / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in self._files(name):
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                self.fetched.append(f"{name}/{file}")
                shutil.copyfile(self.folder / "repositories" / name / file, snapshot / file)
        return str(snapshot)


@torch.no_grad()
def assert_computes(directory: Path, golden: Golden) -> None:
    """Compare the logits of a prompt of several segments."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    i = len(golden.prompts) - 1
    assert relative_l2(model(golden.prompts[i][None]).logits[0], golden.logits(i)) < golden.tolerance(i)
