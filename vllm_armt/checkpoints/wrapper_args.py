"""What the authors' wrapper was constructed with, and no research checkpoint carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.systems import has_option, refuse_foreign_options
from vllm_armt.config.refused import Refused, shown

_OF_SYSTEM = {
    "armt": {"system": "armt", "variant": "v1"},
    "armt_v2": {"system": "armt", "variant": "v2"},
    "armt_hf": {"system": "armt", "variant": "v2"},
    "prmt": {"system": "prmt"},
    "rmt": {"system": "rmt"},
}
"""What the name of a wrapper says; the two families of ARMT differ in the mathematics of the memory."""

_DEFAULTS = {"correction": True, "use_denom": True, "segment_alignment": "left"}
"""Defaults of the authors' constructors; the rest has none there."""

_FIELDS = {
    "aliased",
    "correction",
    "d_mem",
    "gating",
    "n_heads",
    "num_mem_tokens",
    "segment_alignment",
    "segment_size",
    "sliding_window",
    "use_denom",
    "use_sink",
    "variant",
    "wrap_layers",
    "wrap_pos",
}
"""Arguments that are fields of a configuration; most exist in some systems only."""

_MUST_BE_OFF = {"act_on", "attend_to_previous_input"}
"""Arguments that ask for mathematics which no converted checkpoint has."""

_UNUSED = {"dtype", "layers_attr", "memory_dtype", "model_dtype", "saved_with", "seed"} | {
    "act_format",
    "act_type",
    "constant_depth",
    "freeze_mem",
    "k1",
    "k2",
    "max_hop",
    "max_n_segments",
    "noisy_halting",
    "return_all_logits",
    "time_penalty",
    "vary_n_segments",
}
"""Arguments that say nothing which the tensors and the base model's config do not, or that concern training."""

_HINTS = {
    "segment_size": "S, the real tokens of a segment as the wrapper was given it: --segment-size N",
    "variant": "--variant v1 for the 2024 releases, --variant v2 where phi is normalised",
    "n_heads": "--n-heads N, 1 unless the wrapper was given more; with gating no tensor has their number",
}
"""Arguments that cannot be guessed, where the system has them and the tensors do not tell."""


MOST_ALPHA = 1 << 20
"""Bound on the scale of LoRA adapters; real ones have less than 1,000."""


@dataclass(frozen=True)
class WrapperArgs:
    """Constructor arguments of the authors' wrapper, as far as they are known.

    Attributes:
        given: by the names of our configurations' fields, and `system` as our `model_type`. Note that
            `segment_size` is S as the wrapper was given it, real tokens only; the authors' scripts differ here.
        lora_alpha: scale of unmerged LoRA adapters, if there are any.
        path: the file that some of them were read from; None if all were given one by one.
    """

    given: dict[str, Any] = field(default_factory=dict)
    lora_alpha: float | None = None
    path: Path | None = None

    @classmethod
    def resolve(cls, path: Path | None = None, **given: Any) -> WrapperArgs:
        """Gather the arguments from a JSON file and explicit values, which win over the file.

        Args:
            path: a JSON object of constructor arguments, or the config.json that stands beside a
                checkpoint of the authors' `ARMTForCausalLM`. It may name the `system` in the authors'
                words ("armt", "armt_v2", "prmt", "rmt"), and PEFT's arguments under `lora`.
            given: as in `given`, or `lora_alpha`; None for not given.

        Raises:
            Refused: an argument is unknown, or asks for something that is not supported.
        """
        args = {} if path is None else _from_json(path)
        args |= {name: value for name, value in given.items() if value is not None}
        return cls(args, _taken_alpha(args), path)

    def over(self, path: Path) -> WrapperArgs:
        """These, and where they leave something open what a JSON file like that of `resolve` says.

        Raises:
            ValueError: as in `resolve`.
        """
        below = _from_json(path)
        lora_alpha = _taken_alpha(below)
        return WrapperArgs(below | self.given, lora_alpha if self.lora_alpha is None else self.lora_alpha, path)

    def complete(self, found: dict[str, Any], guesses: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """All that there is to know, with the defaults of the authors' constructors.

        Args:
            found: what the tensors say, `system` at least.
            guesses: a sentence for who is asked for a size.

        Returns:
            `given` completed, and the part of it that nobody gave and nothing shows.

        Raises:
            Refused: the tensors say otherwise, the system has no such argument, or one is missing that
                cannot be guessed.
        """
        for name, value in found.items():
            if self.given.get(name, value) != value:
                raise Refused(
                    f"`{name}` was given as {shown(self.given[name])}, but the checkpoint's tensors say {value!r}."
                )
        system = found["system"]
        refuse_foreign_options(system, self.given.keys() - {"system"})
        known = self.given | found
        for name, hint in _HINTS.items():
            if name not in known and has_option(system, name):
                more = guesses if name == "segment_size" else ""
                raise Refused(f"`{name}` is not in the checkpoint and cannot be guessed. Give it: {hint}.{more}")
        if "n_heads" not in self.given and known.get("variant") == "v2" and _may_be_online(found):
            raise Refused(
                f"The tensors are those of an ARMT whose memory has {found['n_heads']} heads, and of online_armt, "
                "in which every token writes to the memory and which is not supported. If it is the former, say so: "
                f"--n-heads {found['n_heads']}."
            )
        assumed = {k: value for k, value in _DEFAULTS.items() if k not in known and has_option(system, k)}
        return known | assumed, assumed


def _may_be_online(found: dict[str, Any]) -> bool:
    """Whether tensors are also those of the authors' online_armt: its heads have up to 256 features, and are 8 else."""
    features = 6 * found.get("d_mem", 0)
    return found.get("n_heads", 1) > 1 and found["n_heads"] == features // min(256, max(features // 8, 1))


def _taken_alpha(args: dict[str, Any]) -> float | None:
    """The scale of LoRA adapters, which the arguments are without then."""
    alpha = args.pop("lora_alpha", None)
    if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < MOST_ALPHA):
        raise Refused(f"`lora_alpha` is {shown(alpha)}; it must be a number above 0 and below {MOST_ALPHA}.")
    return alpha


def _from_json(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    known = _FIELDS | _MUST_BE_OFF | _UNUSED | {"lora", "lora_alpha", "system"}
    if raw.get("model_type") == "armt":
        # a config.json: of the rest, everything is transformers' or concerns training
        raw = {name: value for name, value in raw.items() if name in known} | {"system": "armt_v2"}
    if unknown := sorted(raw.keys() - known):
        raise Refused(
            f"{path}: unknown arguments {', '.join(name[:60] for name in unknown[:8])}. Give a copy without those that "
            "do not concern the memory: --wrapper-args FILE."
        )
    for name in sorted(_MUST_BE_OFF):
        if raw.get(name):
            raise Refused(f"{path}: `{name}` is {shown(raw[name])}, which is not supported in a converted checkpoint.")
    args = {name: raw[name] for name in raw.keys() & (_FIELDS | {"lora_alpha"}) if raw[name] is not None}
    if (lora := raw.get("lora")) is not None:
        if not isinstance(lora, dict):
            raise Refused(f"{path}: `lora` is {shown(lora)}; it must be an object of PEFT's arguments.")
        args.setdefault("lora_alpha", lora.get("lora_alpha"))
    if "system" in raw:
        if not isinstance(raw["system"], str) or raw["system"] not in _OF_SYSTEM:
            raise Refused(
                f"{path}: a checkpoint of system {shown(raw['system'])} cannot be converted; only "
                f"{', '.join(_OF_SYSTEM)} can."
            )
        args = _OF_SYSTEM[raw["system"]] | args
    return args
