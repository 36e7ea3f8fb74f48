"""What the authors' wrapper was constructed with, and no research checkpoint carries."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIANT_OF_SYSTEM = {"armt": "v1", "armt_v2": "v2", "armt_hf": "v2"}
"""The systems that can be converted, and the mathematics of their memory."""

_DEFAULTS = {"correction": True, "use_denom": True}
"""Defaults of the authors' constructor; the rest has none there."""

_CHECKED_BY_CONFIG = {
    "act_on",
    "attend_to_previous_input",
    "gating",
    "n_heads",
    "segment_alignment",
    "sliding_window",
    "use_sink",
    "wrap_layers",
    "wrap_pos",
}
"""Arguments that may ask for other mathematics; ARMTConfig accepts or refuses them."""

_UNUSED = {"dtype", "layers_attr", "memory_dtype", "model_dtype", "saved_with", "seed"}
"""Arguments that say nothing which the tensors and the base model's config do not."""


@dataclass(frozen=True)
class WrapperArgs:
    """Constructor arguments of the authors' wrapper, complete.

    Attributes:
        segment_size: S as the wrapper was given it: real tokens only. Their scripts differ here.
        variant: "v1" or "v2".
        correction, use_denom: see `MemoryRule`.
        lora_alpha: scale of unmerged LoRA adapters, if there are any.
        num_mem_tokens, d_mem: m and p if they were given; the tensors' shapes have the say.
        others: arguments that `ARMTConfig` accepts or refuses.
        assumed: what nobody gave, with the default of the authors' constructor that was taken.
    """

    segment_size: int
    variant: str
    correction: bool
    use_denom: bool
    lora_alpha: float | None = None
    num_mem_tokens: int | None = None
    d_mem: int | None = None
    others: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(cls, path: Path | None = None, **given: Any) -> WrapperArgs:
        """Complete the arguments from a JSON file and explicit values, which win over the file.

        Args:
            path: a JSON object of constructor arguments; may name the `system` in place of `variant`,
                and PEFT's arguments under `lora`.
            given: fields of this class; None for not given.

        Raises:
            ValueError: `segment_size` or `variant` is missing, an argument is unknown, or the system
                is not an ARMT.
        """
        args = {} if path is None else _from_json(path)
        args |= {name: value for name, value in given.items() if value is not None}
        for name, hint in (
            ("segment_size", "S, the real tokens of a segment as the wrapper was given it: --segment-size N"),
            ("variant", "--variant v1 for the 2024 releases, --variant v2 where phi is normalised"),
        ):
            if name not in args:
                raise ValueError(f"`{name}` is not in the checkpoint and cannot be guessed. Give it: {hint}.")
        assumed = {name: value for name, value in _DEFAULTS.items() if name not in args}
        return cls(**(args | assumed), assumed=assumed)


def _from_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must be a JSON object of the wrapper's constructor arguments.")
    args: dict[str, Any] = {"others": {name: raw[name] for name in raw.keys() & _CHECKED_BY_CONFIG}}
    if "system" in raw:
        if raw["system"] not in VARIANT_OF_SYSTEM:
            raise ValueError(
                f"{path}: a checkpoint of system {raw['system']!r} cannot be converted; only "
                f"{', '.join(VARIANT_OF_SYSTEM)} can."
            )
        args["variant"] = VARIANT_OF_SYSTEM[raw["system"]]
    if raw.get("lora") is not None:
        args["lora_alpha"] = raw["lora"].get("lora_alpha")
    plain = {"segment_size", "variant", "correction", "use_denom", "num_mem_tokens", "d_mem", "lora_alpha"}
    if unknown := sorted(raw.keys() - plain - _CHECKED_BY_CONFIG - _UNUSED - {"system", "lora"}):
        raise ValueError(
            f"{path}: unknown arguments {', '.join(unknown)}. Remove those that do not concern the memory."
        )
    return args | {name: raw[name] for name in raw.keys() & plain if raw[name] is not None}
