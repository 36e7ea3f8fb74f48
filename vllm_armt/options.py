"""Options of the plugin, given as `--additional-config '{"armt": {...}}'`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULES = ("auto", "diagonal", "sequential")
ATTENTIONS = ("auto", "flash_attn", "sdpa", "vllm_cpu", "xformers")
PREFIX_TIER = ",prefix"
"""What follows the folder of memories where the prefix cache is kept there, too."""


@dataclass(frozen=True)
class Options:
    """What a user may choose per server.

    Attributes:
        schedule: order in which closed segments pass the layers. "diagonal" runs all layers at a time,
            "sequential" one; "auto" as many as fill the device. Results agree.
        attention: what computes attention inside segments; "auto" takes the fastest that the device and
            the model allow. Results agree.
        target_rows: rows of a grouped forward beyond which the device gains nothing from more; None for
            what is known of the device.
        memories: the folder of memories that last, which servers may share; with ",prefix" behind it, it also keeps
            the last memories of ordinary prompts, so that the prefix cache outlives the server. None: none are kept.
        memories_max_bytes: bytes that the files of this model may take in that folder; None for no bound.
        memories_max_upload_bytes: bytes that a client may send for one memory.
    """

    schedule: str = "auto"
    attention: str = "auto"
    target_rows: int | None = None
    memories: str | None = None
    memories_max_bytes: int | None = None
    memories_max_upload_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for option, allowed in (("schedule", SCHEDULES), ("attention", ATTENTIONS)):
            if (given := getattr(self, option)) not in allowed:
                raise ValueError(
                    f'additional_config["armt"]["{option}"] is {given!r}; allowed: {", ".join(map(repr, allowed))}.'
                )
        for option in ("target_rows", "memories_max_bytes", "memories_max_upload_bytes"):
            number = getattr(self, option)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(
                    f'additional_config["armt"]["{option}"] is {number!r}; it must be a whole number from 1.'
                )
        if self.memories is not None and (
            not isinstance(self.memories, str) or not self.memories.removesuffix(PREFIX_TIER)
        ):
            raise ValueError(
                f'additional_config["armt"]["memories"] is {self.memories!r}; it must be a folder, as in '
                f"'/srv/memories' or '/srv/memories{PREFIX_TIER}'."
            )
        if self.memories is None and self.memories_max_bytes is not None:
            raise ValueError(
                'additional_config["armt"]["memories_max_bytes"] bounds the folder of memories, but "memories" names '
                "none. Give both or neither."
            )

    @property
    def memories_directory(self) -> Path | None:
        """The folder of memories; "~" is the home of who runs the server."""
        if self.memories is None:
            return None
        return Path(self.memories.removesuffix(PREFIX_TIER)).expanduser().absolute()

    @property
    def keeps_prefixes(self) -> bool:
        """Whether memories of ordinary prompts are kept, too."""
        return self.memories is not None and self.memories.endswith(PREFIX_TIER)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Read the options of a vLLM configuration.

        Raises:
            ValueError: an option is unknown, has a value that is not allowed, or stands beside "armt" instead of in it.
        """
        config = vllm_config.additional_config
        given = config.get("armt", {}) if isinstance(config, dict) else {}
        known = [field.name for field in fields(cls)]
        # other keys there may be another plugin's
        if isinstance(config, dict) and (misplaced := [name for name in known if name in config]):
            right = json.dumps({"armt": {name: config[name] for name in misplaced}}, default=str)
            raise ValueError(
                f"additional_config has {', '.join(misplaced)} at its top, where vllm-armt does not look. Write it "
                f"below \"armt\": --additional-config '{right}'."
            )
        if not isinstance(given, dict):
            raise ValueError(
                f'additional_config["armt"] is {given!r}; it must be an object of options, as in '
                '{"armt": {"schedule": "auto"}}.'
            )
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(
                f'additional_config["armt"] has unknown options {", ".join(unknown)}; known: {", ".join(known)}.'
            )
        return cls(**given)
