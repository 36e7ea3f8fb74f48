"""Options of the plugin, given as `--additional-config '{"armt": {...}}'`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULES = ("auto", "diagonal", "sequential")


@dataclass(frozen=True)
class Options:
    """What a user may choose per server.

    Attributes:
        schedule: order in which closed segments pass the layers. "diagonal" runs all layers at a time,
            "sequential" one; "auto" as many as fill the device. Results agree.
    """

    schedule: str = "auto"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f'additional_config["armt"]["schedule"] is {self.schedule!r}; allowed: '
                f"{', '.join(map(repr, SCHEDULES))}."
            )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Read the options of a vLLM configuration.

        Raises:
            ValueError: an option is unknown or has a value that is not allowed.
        """
        config = vllm_config.additional_config
        given = config.get("armt", {}) if isinstance(config, dict) else {}
        if not isinstance(given, dict):
            raise ValueError(
                f'additional_config["armt"] is {given!r}; it must be an object of options, as in '
                '{"armt": {"schedule": "auto"}}.'
            )
        known = [field.name for field in fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(
                f'additional_config["armt"] has unknown options {", ".join(unknown)}; known: {", ".join(known)}.'
            )
        return cls(**given)
