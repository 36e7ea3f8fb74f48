"""A research checkpoint in pieces, to write in any spelling or with any defect."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.golden_cases import Golden
from vllm_armt.checkpoints import Conversion, WrapperArgs, convert
from vllm_armt.checkpoints.read import read_tensors


@dataclass
class Case:
    """A golden's tensors, loaded to be changed; `convert` writes them and converts the file."""

    name: str
    folder: Path
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.golden = Golden(self.name)
        self.tensors: dict[str, Tensor] = read_tensors(self.golden.checkpoint)
        self.args: dict[str, Any] = dict(self.golden.args)
        self.base_config: Path | None = self.golden.path / "base_config"

    @property
    def dst(self) -> Path:
        return self.folder / "dst"

    def save(self) -> Path:
        # safetensors refuses tensors that share memory, as those of torch.save do
        save_file({key: tensor.clone() for key, tensor in self.tensors.items()}, self.folder / "model.safetensors")
        return self.folder / "model.safetensors"

    def wrapper_args(self) -> WrapperArgs:
        path = self.folder / "armt_args.json"
        path.write_text(json.dumps(self.args))
        return WrapperArgs.resolve(path, **self.given)

    def convert(self, src: Path | None = None, **options: Any) -> Conversion:
        return convert(src or self.save(), self.dst, self.base_config, self.wrapper_args(), **options)

    def refused(self, message: str, src: Path | None = None, **options: Any) -> None:
        """Check that the conversion fails with this message and leaves the folder as it was."""
        src = src or self.save()
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            self.convert(src, **options)
        assert not self.dst.exists()
        assert not [path for path in self.folder.iterdir() if path.name.startswith(".")]

    def result(self) -> dict[str, Tensor]:
        return load_file(self.dst / "model.safetensors")
