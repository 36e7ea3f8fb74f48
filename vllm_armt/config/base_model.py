"""The base model's configuration inside of one of ours: transformers makes it, of sizes that are checked before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_armt.config.backbones import BACKBONES, supported_backbones
from vllm_armt.config.refused import Refused, first_words, shown, translated

MOST = 1 << 24
MOST_LAYERS = 1 << 12
SIZES = {
    "vocab_size": MOST,
    "hidden_size": MOST,
    "intermediate_size": MOST,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": MOST,
    "num_key_value_heads": MOST,
    "head_dim": MOST,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "window_size": 1 << 31,
    "num_labels": MOST_LAYERS,
}
"""Sizes by transformers' names, and the largest that is taken: some become lists before any model is made."""

_CHANGES_ALL = {
    "quantization_config": "the weights are quantised. Take the model that is not",
    "per_layer_config": "layers differ from one another in a way of transformers' that is not supported",
}
"""Keys of transformers that any model may have and none of ours computes, and what they say."""


def base_model_config(config: Any, name: str | None) -> PretrainedConfig:
    """The base model's configuration, of what a config.json has of it.

    Keys that transformers does not know of the base model are no fault: it ignores them, and so does everyone else
    who opens that model.

    Args:
        config: its config.json as a dict, a configuration, or None for that of `name`.
        name: where transformers finds it: a directory or a name on the Hugging Face hub.

    Raises:
        Refused: there is none, it is not supported, or a size is out of range.
    """
    if isinstance(config, PretrainedConfig):
        return supported(config)
    if config is None:
        if name is None:
            raise Refused(
                "config.json has neither `base_model_config` (the base model's config.json, nested) nor "
                "`base_model_name` (where to fetch it)."
            )
        config = _fetched(name)
    if not isinstance(config, dict):
        raise Refused(f"`base_model_config` is {shown(config)}; it must be the base model's config.json, an object.")
    return parsed(config, "`base_model_config`")


def _fetched(name: str) -> dict[str, Any]:
    what = f"`base_model_name` is {shown(name)}, whose config.json can't be read here or on the Hugging Face hub"
    try:
        with translated(what):
            return PretrainedConfig.get_config_dict(name)[0]
    except OSError as error:
        raise Refused(
            f"{what}. Put the base model's config.json in as `base_model_config`, or give it where you convert: "
            f"vllm-armt convert SRC DST --base-config PATH. ({first_words(error)})"
        ) from error


def parsed(raw: dict[str, Any], where: str) -> PretrainedConfig:
    """The configuration of a supported base model.

    Args:
        raw: its config.json.
        where: names it in messages.

    Raises:
        Refused: transformers can't make one of it, it is not supported, or a size is out of range; all faults that
            can be told are named.
    """
    if "model_type" not in raw:
        raise Refused(f"{where} has no `model_type`. Supported: {supported_backbones()}.")
    model_type = raw["model_type"]
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        raise Refused(_unsupported(model_type))
    if reasons := list(_faults(raw, CONFIG_MAPPING[model_type], where)):
        raise Refused(*reasons)
    with translated(f"transformers makes no configuration of {where}"):
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    return supported(config)


def supported(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration.

    Raises:
        Refused: it is of a model that is not supported.
    """
    if config.model_type not in BACKBONES:
        raise Refused(_unsupported(config.model_type))
    return config


def _unsupported(model_type: Any) -> str:
    return f"The base model is of type {shown(model_type)}, which is not supported. Supported: {supported_backbones()}."


def _faults(raw: dict[str, Any], config_class: type[PretrainedConfig], where: str) -> Iterator[str]:
    spelled = {native: name for name, native in config_class.attribute_map.items()}
    for key, value in raw.items():
        if key in _CHANGES_ALL and value:
            yield f"{where} has `{key}`: {_CHANGES_ALL[key]}."
        elif callable(getattr(config_class, key, None)):
            yield f"{where} has a key `{key}`, which is the name of a method of transformers'. Take it out."
        most = SIZES.get(spelled.get(key, key))
        if most and value is not None and not _is_size(value, most):
            yield f"{where}: `{key}` is {shown(value)}; it must be an integer of at least 1 and at most {most}."
        elif isinstance(value, list) and any(number > MOST for number in _integers(value)):
            yield f"{where}: `{key}` is {shown(value)}; no number in it may be above {MOST}."


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _integers(values: list[Any]) -> Iterator[int]:
    """All integers in nested lists."""
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(value)
        elif isinstance(value, int):
            yield value
