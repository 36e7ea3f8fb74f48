"""What stands beside the weights: a config.json of any kind, and Python files, which are parsed and never run."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.systems import SYSTEMS
from vllm_armt.config import ARMTConfig, ARMTSWConfig, Refused
from vllm_armt.config.code_beside import Code, code_beside
from vllm_armt.config.versions import Confirmable, Version, refuse_unsupported, version_of

_SIZE = re.compile(r"(?:(\d{1,3})x(\d{2,6})|ctx[_-]?(\d{2,6}))(?!\d)", re.IGNORECASE)
"""As people name what they have trained: 2x1024 (segments x tokens), ctx2048, ctx512x4."""

_MEMORY = re.compile(r"mem[_-]?(\d{1,4})(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Beside:
    """What a checkpoint's directory holds beside its weights.

    Attributes:
        directory: which one.
        called: what the user has called the checkpoint.
        config: the content of config.json; empty if there is none.
        version: of the authors' code, where config.json is an ARMT's; None otherwise.
    """

    directory: Path
    called: str
    config: dict[str, Any]
    version: Version | None

    @classmethod
    def of(cls, directory: Path, called: str, confirmed: Confirmable | None) -> Beside:
        """Look, and find the version before anything else is done.

        Args:
            directory, called: as above.
            confirmed: the version that the user says it is; see `version_of`.

        Raises:
            Refused: config.json is no JSON object, its version can't be told, or it is one that is not supported.
        """
        config, code = _read(directory / CONFIG_NAME), code_beside(directory)
        version = None
        if config.get("model_type") in (ARMTConfig.model_type, ARMTSWConfig.model_type):
            version = version_of(config, code, confirmed)
        elif confirmed:
            raise Refused(f"--code-version is for a checkpoint with an ARMT's config.json, and {directory} has none.")
        refuse_unsupported(version or _of_code(code))
        return cls(directory, called, config, version)

    @property
    def file(self) -> Path:
        """Its config.json."""
        return self.directory / CONFIG_NAME

    @property
    def system(self) -> str | None:
        """The system that config.json names; None if it is of a base model, of arguments alone, or not there."""
        system = self.config.get("model_type")
        return system if isinstance(system, str) and system in SYSTEMS else None

    def refuse_unsaid_window(self, given: Collection[str]) -> None:
        """Refuse a checkpoint whose name alone says that it has a window, which no tensor shows.

        Raises:
            Refused: it does, and `sliding_window` is not among what was `given`.
        """
        if "sliding" in self.called.lower() and "sliding_window" not in given:
            raise Refused(
                f"The name {self.called!r} has 'sliding' in it. If the model was trained with a sliding window, say "
                "--sliding-window, which the research code's checkpoints have with `wrap_pos` alone; if not, "
                "--no-sliding-window."
            )

    @property
    def guesses(self) -> str:
        """What the checkpoint's name seems to say of its sizes, as a sentence to put behind a question; or nothing."""
        memory = _MEMORY.search(self.called)
        for match in _SIZE.finditer(self.called):
            if size := int(match[2] or match[3]):
                m = f" (or {size - int(memory[1])}, if those count its {memory[1]} memory tokens)" if memory else ""
                return (
                    f" The name {self.called!r} has {match[0]!r} in it, which may mean --segment-size {size}{m}: give "
                    "it if you know that it does."
                )
        return ""


def _of_code(code: Code | None) -> Version:
    """A checkpoint without a config.json of its own is the research code's unless its Python file says otherwise."""
    return "online_armt" if code == "online_armt" else "today"


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
