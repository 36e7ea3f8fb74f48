"""Checkpoints of the authors' second-generation code: our layout already, but for a config.json of its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.config import ARMTSWConfig, RecurrentConfig, Refused
from vllm_armt.config.refused import shown


def upgrade_config(directory: Path, options: dict[str, Any]) -> RecurrentConfig:
    """Today's configuration for a config.json of the second-generation code with a sliding window.

    Its `sliding_window_enabled` became a system of its own, "armt_sw", whose tensors have the same names.

    Args:
        directory: where the config.json is.
        options: further fields.

    Raises:
        Refused: there is no config.json of a system of ours, it needs no rewriting, or it asks for
            something that is not supported.
    """
    path = directory / "config.json"
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in SYSTEMS:
        raise Refused(
            f"{directory} holds no checkpoint of the authors' code: no tensor's name has `memory_cell.` in it, and no "
            "config.json there has their `model_type`. To put a fresh memory around a base model use `vllm-armt init`."
        )
    if not raw.pop("sliding_window_enabled", False):
        SYSTEMS[raw["model_type"]].from_dict(raw)  # refuses what cannot be served
        raise Refused(
            f"{directory} is already in the authors' HF layout, which is served as it is: vllm serve {directory}"
        )
    wrapped = raw.get("wrap_layers")
    if wrapped is not None and not isinstance(wrapped, list):
        raise Refused(f"{path}: `wrap_layers` is {shown(wrapped)}; it must be a list of true and false or null.")
    if not all(wrapped or []):
        raise Refused(
            f"{path}: `wrap_layers` leaves layers out. In that code such layers attend over the whole text, which is "
            "not supported."
        )
    # name the class of its time and python files that stood beside it
    for name in ("architectures", "auto_map"):
        raw.pop(name, None)
    refuse_foreign_options(ARMTSWConfig.model_type, options)
    return ARMTSWConfig.from_dict(raw | options | {"model_type": ARMTSWConfig.model_type})
