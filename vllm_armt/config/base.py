"""RecurrentConfig: what the configurations of all systems have in common.

Fields that the authors' code writes keep its names and meaning; what their files leave open is ours.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from transformers import AutoConfig, PretrainedConfig

from vllm_armt.config.backbones import BACKBONES, Backbone, supported_backbones
from vllm_armt.core import Segmentation, SegmentLayout
from vllm_armt.core.pages import PageLayout, StateTensor

GENERATION_POLICIES = ("commit", "open")
ALIGNMENTS = ("left", "right", "center")
LEARNED_POSITIONS = ("grow", "restart")
STATE_DTYPES = ("float32", "bfloat16")

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


class RecurrentConfig(PretrainedConfig):
    """Configuration of a recurrent memory transformer around a base model; the base of every system's own.

    Args:
        base_model_config: the base model's own configuration, as a dict or a config object.
        base_model_name: where to fetch `base_model_config` from when it is absent.
        segment_size: S, real tokens of a segment; memory tokens are not counted.
        num_mem_tokens: m, memory tokens of a segment.
        segment_alignment: where the segments of a prompt lie; see `Segmentation.of_prompt`.
        layers_attr: where the base model keeps its decoder layers.
        wrap_pos: memory tokens have learned position embeddings of their own (GPT-2).
        learned_positions: whether learned positions "restart" in every segment or "grow" over the text.
        sliding_window: every segment sees the keys of the one before, all of them (the Transformer-XL
            cache of the papers' first releases).
        model_dtype: dtype of the base model's weights.
        memory_dtype: dtype of the memory's own weights; null for `model_dtype`.
        state_dtype: in what the server keeps what a segment leaves; null for the dtype of the served model.
        generation_policy: what happens when generation fills a segment. "commit" writes it to memory
            and opens the next one; "open" (the papers' releases) never writes the prompt's last segment.
        max_context: tokens that the server accepts by default (`--max-model-len` overrides it).

    Raises:
        ValueError: a required field is missing, out of range, or asks for unsupported mathematics.
    """

    sub_configs: ClassVar = {"base_model_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True
    required: ClassVar[dict[str, str]] = {
        "segment_size": "S, the real tokens of a segment",
        "num_mem_tokens": "m, the memory tokens of a segment",
    }
    """Fields that cannot be guessed, and what they mean."""

    base_model_config: Any = None
    base_model_name: str | None = None
    # required; None only stands for "not given", which `_validate` refuses in our words
    segment_size: Any = None
    num_mem_tokens: Any = None
    segment_alignment: str | None = "left"
    layers_attr: str | None = None
    wrap_pos: bool | None = False
    learned_positions: str = "restart"
    sliding_window: bool | None = False
    model_dtype: str | None = None
    memory_dtype: str | None = None
    state_dtype: str | None = None
    generation_policy: str = "commit"
    max_context: int = 1 << 20
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = _drop_foreign(kwargs)
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
        self.segment_alignment = self.segment_alignment or "left"
        self._validate()
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The base model's configuration: sizes, heads and vocabulary are its own."""
        return self.base_model_config

    @property
    def backbone(self) -> Backbone:
        """Where the base model keeps its parts."""
        return BACKBONES[self.base_model_config.model_type]

    @property
    def prefix_rows(self) -> int:
        """Rows of a cell before its tokens."""
        return 0

    @property
    def window(self) -> Literal["all", "sliding"] | None:
        """What a segment's rows see of the keys of the segment before: all, those one window back, or none."""
        return "all" if self.sliding_window else None

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """What a closed segment leaves at a layer: names and shapes."""
        raise NotImplementedError

    @property
    def segment_layout(self) -> SegmentLayout:
        """The rows of a segment and their positions."""
        prefix, S, m = self.prefix_rows, self.segment_size, self.num_mem_tokens
        if self.backbone.positions is None:
            return SegmentLayout(prefix, S, m)
        suffix = prefix + self.base_model_config.max_position_embeddings if self.wrap_pos else None
        stride = prefix + S + m if self.learned_positions == "grow" else 0
        return SegmentLayout(prefix, S, m, suffix, stride)

    def page_layout(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
        """The pages of a model that is served in `dtype`, with `kv_heads` key-value heads on this rank."""
        kept = getattr(torch, self.state_dtype) if self.state_dtype else dtype
        state = {name: StateTensor(shape, kept) for name, shape in self.state.items()}
        layout, keys_stay = self.segment_layout, self.window is not None
        return PageLayout(layout.tokens, layout.rows, kv_heads, head_dim, dtype, state, keys_stay)

    @property
    def extra_positions(self) -> int:
        """Learned position embeddings beside the base model's own: those of prefix and suffix with `wrap_pos`."""
        return self.prefix_rows + self.num_mem_tokens if self.wrap_pos else 0

    @property
    def position_limit(self) -> int | None:
        """Tokens of a text for which there are learned positions; None where they start anew in each segment."""
        layout = self.segment_layout
        if not layout.stride:
            return None
        segments, rest = divmod(self.base_model_config.max_position_embeddings, layout.stride)
        return segments * layout.tokens + max(0, min(rest - layout.prefix, layout.tokens - 1))

    @property
    def max_open_tokens(self) -> int:
        """Tokens that a segment which never closes can hold: the base model's positions, or what its layers see."""
        limit = self.base_model_config.max_position_embeddings - (0 if self.wrap_pos else self.prefix_rows)
        if self.window:
            reaches = [reach for reach in self._base_reaches if reach is not None]
            limit = min([limit, *(reach - self.prefix_rows - self.segment_size for reach in reaches)])
        return max(limit, self.segment_size)

    @property
    def num_positions(self) -> int:
        """How far apart a query and a key can be, and one more."""
        layout = self.segment_layout
        rows = (
            max(layout.rows, layout.prefix + self.max_open_tokens) if self.generation_policy == "open" else layout.rows
        )
        return rows + (layout.tokens if self.window else 0)

    @property
    def reaches(self) -> list[int | None]:
        """Per layer, how many rows of its segment a row sees, up to and with itself; None for all before it.

        The base model's own sliding window, counted over all rows of a segment, those of the memory among them: so
        transformers' layers count it, which the authors' code hands such segments to. What stands before the tokens,
        an RMT's memory for instance, is out of reach of later tokens in these layers; the memory tokens behind them
        see the segment's end alone.
        """
        return [None if (reach or self.num_positions) >= self.num_positions else reach for reach in self._base_reaches]

    @property
    def needs_prompt_length(self) -> bool:
        """Whether where a request's segments lie depends on the length of its prompt."""
        return self.generation_policy == "open"

    def segmentation(self, num_prompt_tokens: int) -> Segmentation:
        """Where the segments of a request lie; the prompt's length matters only if `needs_prompt_length`."""
        assert self.segment_alignment is not None
        return Segmentation.of_prompt(
            self.segment_size, self.segment_alignment, self.needs_prompt_length, num_prompt_tokens
        )

    def _validate(self) -> None:
        base = self.base_model_config
        for name, what in self.required.items():
            value = getattr(self, name)
            if value is None:
                raise ValueError(
                    f"config.json has no `{name}` ({what}). It cannot be guessed: set it to the value "
                    "that the model was trained with."
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1 ({what}).")
        if base.model_type not in BACKBONES:
            raise ValueError(
                f"The base model is of type {base.model_type!r}, which is not supported. "
                f"Supported: {supported_backbones()}."
            )
        softcapping = getattr(base, "final_logit_softcapping", None)
        if softcapping is not None:
            raise ValueError(
                f"`final_logit_softcapping` of the base model is {softcapping!r}; only None is supported: logits are "
                "the head's own."
            )
        expected = self.backbone.layers
        if self.layers_attr is None:
            self.layers_attr = expected
        elif self.layers_attr != expected:
            raise ValueError(
                f"`layers_attr` is {self.layers_attr!r}, but a {base.model_type} keeps its layers in {expected!r}."
            )
        one_of("segment_alignment", self.segment_alignment, ALIGNMENTS)
        one_of("generation_policy", self.generation_policy, GENERATION_POLICIES)
        one_of("learned_positions", self.learned_positions, LEARNED_POSITIONS)
        if self.state_dtype is not None:
            one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.segment_alignment != "left" and self.generation_policy != "open":
            raise ValueError(
                f"`segment_alignment` is {self.segment_alignment!r} and `generation_policy` is "
                f"{self.generation_policy!r}: where segments are counted from the prompt's end, a generated token must "
                "not move them. Only generation_policy 'open' goes with it."
            )
        self._validate_positions()
        self._validate_window()

    def _validate_positions(self) -> None:
        base, layout = self.base_model_config, self.segment_layout
        if self.backbone.positions is None:
            if self.wrap_pos:
                raise ValueError(
                    f"`wrap_pos` is true, but a {base.model_type} has no learned positions to add those of memory "
                    "tokens to."
                )
            return
        if self.wrap_pos and self.learned_positions == "grow":
            raise ValueError("`wrap_pos` is true and `learned_positions` is 'grow'; only 'restart' goes with it.")
        if self.segment_alignment != "left" and self.learned_positions == "grow":
            raise ValueError(
                f"`segment_alignment` is {self.segment_alignment!r} and `learned_positions` is 'grow': positions grow "
                "over segments of equal length only. Set `learned_positions` to 'restart' if the model was trained so."
            )
        needed = layout.tokens if self.wrap_pos else layout.rows
        if needed > base.max_position_embeddings:
            raise ValueError(
                f"A segment needs {needed} learned positions (`segment_size` {layout.tokens}"
                f"{'' if self.wrap_pos else ' and its memory tokens'}), but the base model has "
                f"{base.max_position_embeddings}. Use a smaller `segment_size`."
            )

    @property
    def _base_reaches(self) -> list[int | None]:
        """Per layer, the rows of the base model's own sliding window; None where it has none."""
        return self.backbone.reaches(self.base_model_config)

    def _validate_window(self) -> None:
        if self.sliding_window and not self.wrap_pos:
            raise ValueError(
                "`sliding_window` is true: that Transformer-XL cache of the first releases is defined for learned "
                "positions with `wrap_pos` only. Models with the newer code's sliding window have model_type 'armt_sw'."
            )
        if self.window is not None and self.segment_alignment != "left":
            raise ValueError(
                f"`segment_alignment` is {self.segment_alignment!r}: with a window into the segment before every "
                "segment but the last has to be full, which only 'left' gives."
            )
        needed = self.segment_layout.rows + self.segment_size
        for reach in self._base_reaches if self.window else ():
            if reach is not None and reach < needed:
                raise ValueError(
                    f"The base model attends within a sliding window of {reach} tokens, and its segments are to see "
                    f"the one before: {needed} rows with their memory tokens. How far such layers reach over a "
                    "boundary is defined nowhere: use a smaller `segment_size`, or a system without a window into the "
                    "segment before."
                )


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ValueError: it is not; the message lists them.
    """
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
        raise ValueError(f"`base_model_config` has no `model_type`. Supported: {supported_backbones()}.")
    return AutoConfig.for_model(**config)


def _drop_foreign(fields: dict[str, Any]) -> dict[str, Any]:
    """Refuse fields that change the mathematics, drop those of the authors' that mean nothing here."""
    for name in sorted(fields.keys() & _REFUSED.keys()):
        if fields[name] not in _REFUSED[name]:
            raise ValueError(
                f"`{name}` is {fields[name]!r}. That option changes the mathematics and is not supported here; "
                f"only {_REFUSED[name][0]!r} is."
            )
    return {k: v for k, v in fields.items() if k not in _REFUSED and k not in _MEANINGLESS}
