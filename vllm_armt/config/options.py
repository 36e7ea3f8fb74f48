"""Options of the plugin, given as `--additional-config '{"armt": {...}}'`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULES = ("auto", "diagonal", "sequential")
ATTENTIONS = ("auto", "flash_attn", "sdpa", "vllm_cpu", "xformers")


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
    """

    schedule: str = "auto"
    attention: str = "auto"
    target_rows: int | None = None

    def __post_init__(self) -> None:
        for option, allowed in (("schedule", SCHEDULES), ("attention", ATTENTIONS)):
            if (given := getattr(self, option)) not in allowed:
                raise ValueError(
                    f'additional_config["armt"]["{option}"] is {given!r}; allowed: {", ".join(map(repr, allowed))}.'
                )
        rows = self.target_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(f'additional_config["armt"]["target_rows"] is {rows!r}; it must be a whole number from 1.')

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
