"""The options that each system has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from vllm_armt.config import CONFIGS, RecurrentConfig, Refused

SYSTEMS: dict[str, type[RecurrentConfig]] = {config.model_type: config for config in CONFIGS}
"""The configuration of every system, by its name."""


def has_option(system: str, name: str) -> bool:
    """Whether the system's configuration has this field."""
    return any(field.name == name for field in fields(SYSTEMS[system]))


def refuse_foreign_options(system: str, names: Iterable[str]) -> None:
    """Refuse options that the system does not have.

    Raises:
        Refused: there is one; the message says which systems have it.
    """
    for name in names:
        if not has_option(system, name):
            owners = [owner for owner in SYSTEMS if has_option(owner, name)]
            raise Refused(
                f"System {system!r} has no option `{name}`"
                + (
                    f", only {', '.join(owners)} {'has' if len(owners) == 1 else 'have'}: leave it out."
                    if owners
                    else "."
                )
            )
