"""What a config.json of ours may hold: its architecture, its keys, and of which type their values are.

What is not known is refused: the authors' code has versions that share names with ours and compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PretrainedConfig

from vllm_armt.config.refused import not_one_of, shown

if TYPE_CHECKING:
    from vllm_armt.config.base import RecurrentConfig

LARGEST = 1 << 20
"""Of a segment, of its memory tokens, of the memory's sizes."""

LARGEST_OF = {"max_context": 1 << 31}
"""Where it is another."""

_TYPES = {"bool": "true or false", "str": "a string", "list[bool]": "a list of true and false", "None": "null"}

_OWN = {type(None): "None", bool: "bool", str: "str", list: "list[bool]"}

_DTYPES = {"model_dtype", "memory_dtype"}
"""Fields that also take torch's own objects, and are checked where these become names."""

_EARLIER = {
    "_attn_implementation_autoset",
    "add_cross_attention",
    "auto_map",
    "cross_attention_hidden_size",
    "finetuning_task",
    "is_decoder",
    "model_type",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
}
"""Keys that transformers writes into any config.json, or wrote in its releases before the fifth."""

_MEANINGLESS = {
    "attn_implementation",
    "base_attn_implementation",
    "freeze_mem",
    "act_type",
    "act_format",
    "max_hop",
    "noisy_halting",
    "constant_depth",
    "time_penalty",
}
"""Fields of the authors' configs that choose a kernel, concern training, or configure an option that is off."""

_REFUSED = {
    "act_on": (False, None),
    "attend_to_previous_input": (False, None),
    "n_heads": (1, None),
    "gating": (False, None),
    "use_sink": (False, None),
    "sliding_window_enabled": (False, None),
    "aliased": (None,),
}
"""Fields that change the mathematics where a system has them, with the values at which they do not."""

_OF_EVERYONE = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
"""Keys of a base model's that a model around it may have otherwise."""


def wrong_architecture(config: RecurrentConfig) -> Iterator[str]:
    """The sentence that refuses the class which a checkpoint was saved from, where it is not the one of its type."""
    if config.architectures and config.architectures != [config.architecture]:
        yield (
            f"`architectures` is {shown(config.architectures)}; a model of type {config.model_type!r} is a "
            f"[{config.architecture!r}]. A class of another name computes something else, and is not known here."
        )


def wrong_types(config: RecurrentConfig) -> Iterator[str]:
    """A sentence for each field of ours whose value is of another type than allowed, or out of range."""
    inherited = {field.name for field in fields(PretrainedConfig)}
    for field in fields(config):
        value, allowed = getattr(config, field.name), str(field.type).split(" | ")
        if field.name in inherited or field.name in config.required or field.name in _DTYPES:
            continue
        if field.name in config.choices:
            if value not in config.choices[field.name] and not (value is None and "None" in allowed):
                yield not_one_of(field.name, value, config.choices[field.name])
        elif allowed == ["int"]:
            if reason := not_a_size(field.name, value):
                yield reason
        elif allowed != ["Any"] and not _is_any_of(value, allowed):
            yield f"`{field.name}` is {shown(value)}; it must be {' or '.join(_TYPES[kind] for kind in allowed)}."


def not_a_size(name: str, value: Any, meaning: str = "") -> str | None:
    """The sentence that refuses a value that is no size; None if it is one."""
    most = LARGEST_OF.get(name, LARGEST)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return None
    what = f" ({meaning})" if meaning else ""
    return f"`{name}` is {shown(value)}; it must be an integer of at least 1 and at most {most}{what}."


def changed_mathematics(kwargs: dict[str, Any]) -> Iterator[str]:
    """A sentence for each field of another system's that changes the mathematics."""
    for name in sorted(kwargs.keys() & _REFUSED.keys()):
        if kwargs[name] not in _REFUSED[name]:
            yield (
                f"`{name}` is {shown(kwargs[name])}. That option changes the mathematics and is not supported here; "
                f"only {_REFUSED[name][0]!r} is."
            )


def without_foreign(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keys without those of other systems and of the authors' that mean nothing here."""
    return {name: value for name, value in kwargs.items() if name not in _REFUSED and name not in _MEANINGLESS}


def unknown_keys(keys: Iterable[str], config: RecurrentConfig) -> Iterator[str]:
    """The sentence that refuses keys that are neither the system's nor transformers'."""
    known = _keys_of_transformers() | _keys_of(config.base_model_config)
    if unknown := sorted(set(keys) - known):
        named = ", ".join(f"`{name[:60]}`" for name in unknown[:8]) + ("" if len(unknown) <= 8 else ", ...")
        own = sorted({field.name for field in fields(config)} - {field.name for field in fields(PretrainedConfig)})
        yield (
            f"config.json has {'a key' if len(unknown) == 1 else 'keys'} that a model of type {config.model_type!r} "
            f"does not: {named}. What it means is not known here, and it may change the mathematics: take it out if it "
            f"does not. Known are {', '.join(own)}, and those of transformers and of the base model."
        )


def contradictions(kwargs: dict[str, Any], base: PretrainedConfig) -> Iterator[str]:
    """A sentence for each key of the base model's that says something else than the base model's configuration."""
    own = _keys_of(base) - _keys_of_transformers() - _OF_EVERYONE
    for name in sorted(kwargs.keys() & own):
        if kwargs[name] != (value := getattr(base, name, None)):
            yield (
                f"`{name}` is {shown(kwargs[name])}, but `base_model_config` says {shown(value)}. It is a key of the "
                "base model: take it out here, or set both alike."
            )


def _is_any_of(value: Any, allowed: list[str]) -> bool:
    kind = _OWN.get(type(value))
    return kind in allowed and (kind != "list[bool]" or all(type(entry) is bool for entry in value))


@cache
def _keys_of_transformers() -> frozenset[str]:
    """Keys that transformers itself may have written, whatever the model."""
    attributes = {name for name in dir(PretrainedConfig) if not callable(getattr(PretrainedConfig, name))}
    changing = {"per_layer_config", "per_layer_attributes"}
    public = {name for name in attributes if not name.startswith("__")} - changing
    generation = set(vars(GenerationConfig())) | GenerationConfig._get_default_generation_params().keys()
    return frozenset(public | set(vars(PretrainedConfig())) | generation | _EARLIER | {"attn_implementation"})


def _keys_of(base: PretrainedConfig) -> set[str]:
    """Keys of a base model's configuration."""
    return {field.name for field in fields(base)} | base.attribute_map.keys()
