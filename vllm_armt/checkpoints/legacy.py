"""Checkpoints of the authors' code whose tensors have today's names, but for a config.json of an older version."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_armt.checkpoints.beside import Beside
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.config import RecurrentConfig, Refused
from vllm_armt.config.versions import in_todays_words, refuse_untried_base


def upgrade_config(beside: Beside, base: PretrainedConfig | None, options: dict[str, Any]) -> RecurrentConfig:
    """Today's configuration for a config.json of an older version.

    Args:
        beside: with the config.json.
        base: the base model's configuration, where only its name is in there.
        options: further fields.

    Raises:
        Refused: there is no config.json of a system of ours, it needs no rewriting, or it asks for
            something that is not supported.
    """
    directory, raw = beside.directory, beside.config
    if beside.system is None:
        raise Refused(
            f"{directory} holds no checkpoint of the authors' code: no tensor's name has `memory_cell.` in it, and no "
            "config.json there has their `model_type`. To put a fresh memory around a base model use `vllm-armt init`."
        )
    if beside.version in (None, "today"):
        SYSTEMS[beside.system].from_dict(raw)  # refuses what cannot be served
        raise Refused(
            f"{directory} is already in the authors' HF layout, which is served as it is: vllm serve {beside.called}"
        )
    if base is not None and raw.get("base_model_config") is not None:
        raise Refused(f"{beside.file} says what the base model is: leave --base-config out.")
    fields = in_todays_words(raw, beside.version)
    if base is not None:
        fields |= {"base_model_config": base, "base_model_name": None}
    refuse_foreign_options(fields["model_type"], options)
    config = SYSTEMS[fields["model_type"]].from_dict(fields | options)
    refuse_untried_base(beside.version, config.base_model_config.model_type, config.backbone.positions is not None)
    return config
