"""A research checkpoint in pieces, to write in any spelling or with any defect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from golden_cases import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_armt.checkpoints import Conversion, WrapperArgs, convert


@dataclass
class Case:
    """A golden's tensors, loaded to be changed; `convert` writes them and converts the file."""

    name: str
    folder: Path
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors: dict[str, Tensor] = load_file(self.golden / "model.safetensors")
        self.args: dict[str, Any] = json.loads((self.golden / "armt_args.json").read_text())
        self.base_config: Path = self.golden / "base_config"

    @property
    def golden(self) -> Path:
        return ROOT / self.name

    @property
    def dst(self) -> Path:
        return self.folder / "dst"

    def save(self) -> Path:
        save_file(self.tensors, self.folder / "model.safetensors")
        return self.folder / "model.safetensors"

    def wrapper_args(self) -> WrapperArgs:
        path = self.folder / "armt_args.json"
        path.write_text(json.dumps(self.args))
        return WrapperArgs.resolve(path, **self.given)

    def convert(self, src: Path | None = None, **options: Any) -> Conversion:
        return convert(src or self.save(), self.dst, self.base_config, self.wrapper_args(), **options)

    def result(self) -> dict[str, Tensor]:
        return load_file(self.dst / "model.safetensors")


@pytest.fixture
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lambda name: Case(name, tmp_path_factory.mktemp(name))


@pytest.fixture
def tied(make_case: Callable[[str], Case]) -> Case:
    """Spelled by `safetensors.torch.save_model`: layers once, the tied embedding as lm_head."""
    return make_case("armt_llama_gqa_tied")


@pytest.fixture
def untied(make_case: Callable[[str], Case]) -> Case:
    return make_case("armt_llama_untied")


@pytest.fixture
def lora(make_case: Callable[[str], Case]) -> Case:
    return make_case("armt_llama_lora")
