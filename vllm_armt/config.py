"""ARMTConfig: the configuration of an ARMT checkpoint, field-compatible with the authors' newest code.

Fields that the authors' code writes keep its names and meaning. Four are ours, for what their files
leave open: `variant`, `generation_policy`, `state_dtype` and `max_context`. Options of older code
that mean nothing here are accepted; those that would change the mathematics are refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from vllm_armt.core import MemoryRule

logger = logging.get_logger(__name__)

LAYERS_ATTR = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
"""Backbones that are supported, by `model_type`, and where their decoder layers live."""

VARIANTS = ("v1", "v2")
GENERATION_POLICIES = ("commit", "open")
STATE_DTYPES = ("float32", "bfloat16")

_MEANINGLESS = {
    "attn_implementation",
    "base_attn_implementation",
    "act_type",
    "act_format",
    "max_hop",
    "noisy_halting",
    "constant_depth",
    "time_penalty",
}
"""Fields of the authors' configs that choose a kernel or configure an option that is off."""

_REFUSED = {
    "n_heads": (1, None),
    "gating": (False, None),
    "act_on": (False, None),
    "attend_to_previous_input": (False, None),
    "sliding_window": (False, None),
    "sliding_window_enabled": (False, None),
    "use_sink": (False, None),
    "wrap_pos": (False, None),
}
"""Fields of older configs that change the mathematics, with the values at which they do not."""


class ARMTConfig(PretrainedConfig):
    """Configuration of an associative recurrent memory transformer around a base model.

    Args:
        base_model_config: the base model's own configuration, as a dict or a config object.
        base_model_name: where to fetch `base_model_config` from when it is absent.
        segment_size: S, real tokens of a segment; memory tokens are not counted.
        num_mem_tokens: m, memory tokens appended to every segment.
        d_mem: p, width of the memory's queries and keys before the feature map.
        segment_alignment: only "left" (segments are counted from the first token) is supported.
        layers_attr: where the base model keeps its decoder layers.
        correction, use_denom: see `MemoryRule`.
        variant: "v1" (phi as it is, the 2024 releases) or "v2" (phi normalised, everything newer).
        wrap_layers: per layer, whether it has a memory; null for all.
        model_dtype: dtype of the base model's weights.
        memory_dtype: dtype of the memory tokens and of W_mq, W_mk, W_mv, W_mb; null for `model_dtype`.
        state_dtype: dtype in which M and z are kept between steps, "float32" or "bfloat16".
        generation_policy: what happens when generation fills a segment. "commit" writes it to memory
            and opens the next one; "open" (the papers' releases) never writes it.
        max_context: tokens that the server accepts by default (`--max-model-len` overrides it).
        freeze_mem: a training option of the authors'; kept, not used.

    Raises:
        ValueError: a required field is missing, out of range, or asks for unsupported mathematics.
    """

    model_type = "armt"
    sub_configs: ClassVar = {"base_model_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True

    base_model_config: Any = None
    base_model_name: str | None = None
    # required; None only stands for "not given", which `_validate` refuses in our words
    segment_size: Any = None
    num_mem_tokens: Any = None
    d_mem: Any = None
    segment_alignment: str | None = "left"
    layers_attr: str | None = None
    freeze_mem: bool = False
    correction: bool = True
    use_denom: bool = True
    variant: str = "v2"
    wrap_layers: list[bool] | None = None
    model_dtype: str | None = None
    memory_dtype: str | None = None
    state_dtype: str = "float32"
    generation_policy: str = "commit"
    max_context: int = 1 << 20
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = _drop_foreign(kwargs, self.wrap_layers)
        self.base_model_config = _base_config(self.base_model_config, self.base_model_name)
        base = self.base_model_config
        # the wrapper's default of True would tie the head of a base model that is not tied
        self.tie_word_embeddings = bool(getattr(base, "tie_word_embeddings", False))
        self.model_dtype = _dtype_name(self.model_dtype or base.dtype)
        self.memory_dtype = _dtype_name(self.memory_dtype)
        # the authors write the dtype of `memory` here; everyone else means the model's
        self.dtype = self.model_dtype
        # transformers would reset the base's choice of attention to none
        kwargs["attn_implementation"] = base._attn_implementation
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(base, name, None))
        self._validate()
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The base model's configuration: sizes, heads and vocabulary are its own."""
        return self.base_model_config

    @property
    def memory_rule(self) -> MemoryRule:
        """How this checkpoint's memory is read and written."""
        return MemoryRule(self.variant == "v2", self.correction, self.use_denom)

    @property
    def has_memory(self) -> list[bool]:
        """Per layer, whether it has an associative memory."""
        return self.wrap_layers or [True] * self.base_model_config.num_hidden_layers

    @property
    def feature_size(self) -> int:
        """K, the width of the feature map."""
        return 6 * self.d_mem

    def _validate(self) -> None:
        base = self.base_model_config
        for name, what in (
            ("segment_size", "S, the real tokens of a segment"),
            ("num_mem_tokens", "m, the memory tokens appended to each segment"),
            ("d_mem", "the width of memory queries and keys"),
        ):
            value = getattr(self, name)
            if value is None:
                raise ValueError(
                    f"config.json has no `{name}` ({what}). It cannot be guessed: set it to the value "
                    "that the model was trained with."
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1 ({what}).")
        if base.model_type not in LAYERS_ATTR:
            raise ValueError(
                f"The base model is of type {base.model_type!r}, which is not supported. "
                f"Supported: {', '.join(sorted(LAYERS_ATTR))}."
            )
        expected = LAYERS_ATTR[base.model_type]
        if self.layers_attr is None:
            self.layers_attr = expected
        elif self.layers_attr != expected:
            raise ValueError(
                f"`layers_attr` is {self.layers_attr!r}, but a {base.model_type} keeps its layers in {expected!r}."
            )
        if self.segment_alignment not in ("left", None):
            raise ValueError(
                f"`segment_alignment` is {self.segment_alignment!r}; only 'left' is supported: a growing text "
                "must not move the boundaries of segments that are already in memory."
            )
        _one_of("variant", self.variant, VARIANTS)
        _one_of("generation_policy", self.generation_policy, GENERATION_POLICIES)
        _one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.wrap_layers is not None and len(self.wrap_layers) != base.num_hidden_layers:
            raise ValueError(
                f"`wrap_layers` has {len(self.wrap_layers)} entries, but the base model has "
                f"{base.num_hidden_layers} layers."
            )
        if getattr(base, "use_sliding_window", base.model_type == "mistral"):
            window = getattr(base, "sliding_window", None)
            if window is not None and window < self.segment_size + self.num_mem_tokens:
                raise ValueError(
                    f"The base model attends within a sliding window of {window} tokens, less than a segment and "
                    f"its memory tokens ({self.segment_size} + {self.num_mem_tokens}); that is not supported."
                )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{name!r} is not a floating-point torch dtype; write for instance 'float32' or 'bfloat16'.")
    return name


def _base_config(config: Any, name: str | None) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    if config is None:
        if name is None:
            raise ValueError(
                "config.json has neither `base_model_config` (the base model's config.json, nested) nor "
                "`base_model_name` (where to fetch it)."
            )
        return AutoConfig.from_pretrained(name)
    if "model_type" not in config:
        raise ValueError(f"`base_model_config` has no `model_type`. Supported: {', '.join(sorted(LAYERS_ATTR))}.")
    return AutoConfig.for_model(**config)


def _drop_foreign(fields: dict[str, Any], wrap_layers: list[bool] | None) -> dict[str, Any]:
    """Refuse fields that change the mathematics, drop those of the authors' that mean nothing here."""
    old = sorted(fields.keys() & _REFUSED.keys())
    for name in old:
        if fields[name] not in _REFUSED[name]:
            raise ValueError(
                f"`{name}` is {fields[name]!r}. That option of older ARMT code changes the mathematics and is not "
                f"supported; only {_REFUSED[name][0]!r} is."
            )
    if old and wrap_layers is not None and not all(wrap_layers):
        raise ValueError(
            f"`wrap_layers` leaves layers out and the config is an old one (it has {', '.join(old)}): there such "
            "layers attend over the whole text, which is not supported."
        )
    return {k: v for k, v in fields.items() if k not in _REFUSED and k not in _MEANINGLESS}
