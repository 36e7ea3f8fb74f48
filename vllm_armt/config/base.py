"""RecurrentConfig: what the configurations of all systems have in common.

Fields that the authors' code writes keep its names and meaning; what their files leave open is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from transformers import AutoConfig, PretrainedConfig

from vllm_armt.config.backbones import BACKBONES, Backbone
from vllm_armt.config.base_model import base_model_config
from vllm_armt.config.known import (
    changed_mathematics,
    contradictions,
    not_a_size,
    unknown_keys,
    without_foreign,
    wrong_architecture,
    wrong_types,
)
from vllm_armt.config.refused import Refused, shown, translated
from vllm_armt.core import Segmentation, SegmentLayout, Window
from vllm_armt.core.pages import PageLayout, StateTensor

GENERATION_POLICIES = ("commit", "open")
ALIGNMENTS = ("left", "right", "center")
LEARNED_POSITIONS = ("grow", "restart")
STATE_DTYPES = ("float32", "bfloat16")
DTYPES = ("float16", "bfloat16", "float32", "float64")


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
        Refused: a required field is missing, a value is of another type or out of range, a key or the architecture is
            not known, or the mathematics is not supported. All faults that can be told are named.
    """

    architecture: ClassVar[str]
    """The class that a checkpoint is saved from."""

    sub_configs: ClassVar = {"base_model_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True
    required: ClassVar[dict[str, str]] = {
        "segment_size": "S, the real tokens of a segment",
        "num_mem_tokens": "m, the memory tokens of a segment",
    }
    """Fields that cannot be guessed, and what they mean."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "segment_alignment": ALIGNMENTS,
        "generation_policy": GENERATION_POLICIES,
        "learned_positions": LEARNED_POSITIONS,
        "state_dtype": STATE_DTYPES,
    }
    """Fields that are one of some words."""

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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The configuration of a config.json; see transformers.

        Raises:
            Refused: as above, whatever the config.json holds.
        """
        with translated(f"transformers makes no configuration of type {cls.model_type!r} of this config.json"):
            return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        # whoever knows the version of the authors' code has taken out the keys that are its own by now
        reasons = [*wrong_architecture(self), *wrong_types(self), *changed_mathematics(kwargs)]
        kwargs = without_foreign(kwargs)
        try:
            self.base_model_config = base_model_config(self.base_model_config, self.base_model_name)
        except Refused as refused:
            raise Refused(*reasons, *refused.reasons) from refused
        base = self.base_model_config
        reasons += [*unknown_keys(kwargs, self), *contradictions(kwargs, base), *self._wrong_sizes()]
        if reasons:
            raise Refused(*reasons)
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
        if self.segment_alignment is None:
            self.segment_alignment = "left"
        self.layers_attr = self.layers_attr or self.backbone.layers
        if reasons := list(self._inconsistencies()):
            raise Refused(*reasons)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Check the fields again, which `--hf-overrides` sets on a configuration that is complete.

        Raises:
            Refused: there are faults.
        """
        reasons = [*wrong_architecture(self), *wrong_types(self), *self._wrong_sizes()]
        if reasons := reasons or list(self._inconsistencies()):
            raise Refused(*reasons)

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
    def window(self) -> Window | None:
        """What a segment's rows see of the keys of the segment before; None for nothing."""
        return "all" if self.sliding_window else None

    @property
    def window_shift(self) -> int:
        """How many positions further back those keys lie than in their own segment."""
        return 0

    @property
    def full_suffix(self) -> bool:
        """Whether the rows behind a segment's tokens all see one another."""
        return False

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """What a closed segment leaves at a layer: names and shapes."""
        raise NotImplementedError

    @property
    def segment_layout(self) -> SegmentLayout:
        """The rows of a segment and their positions."""
        prefix, S, m = self.prefix_rows, self.segment_size, self.num_mem_tokens
        if self.backbone.positions is None:
            return SegmentLayout(prefix, S, m, full_suffix=self.full_suffix)
        suffix = prefix + self.base_model_config.max_position_embeddings if self.wrap_pos else None
        stride = prefix + S + m if self.learned_positions == "grow" else 0
        return SegmentLayout(prefix, S, m, suffix, stride, self.full_suffix)

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
            limit = min([limit, *(reach - self.prefix_rows - self._rows_before for reach in reaches)])
        return max(limit, self.segment_size)

    @property
    def num_positions(self) -> int:
        """How far apart a query and a key can be, and one more."""
        layout = self.segment_layout
        rows = (
            max(layout.rows, layout.prefix + self.max_open_tokens) if self.generation_policy == "open" else layout.rows
        )
        return rows + self._rows_before

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

    def _wrong_sizes(self) -> Iterator[str]:
        """A sentence for each required field that is missing or out of range."""
        for name, what in self.required.items():
            if (value := getattr(self, name)) is None:
                yield (
                    f"config.json has no `{name}` ({what}). It cannot be guessed: set it to the value "
                    "that the model was trained with."
                )
            elif reason := not_a_size(name, value, what):
                yield reason

    def _inconsistencies(self) -> Iterator[str]:
        """A sentence for each thing that does not go with another; every value is of its type by now."""
        if self.layers_attr != self.backbone.layers:
            yield (
                f"`layers_attr` is {shown(self.layers_attr)}, but a {self.base_model_config.model_type} keeps its "
                f"layers in {self.backbone.layers!r}."
            )
        softcapping = getattr(self.base_model_config, "final_logit_softcapping", None)
        if softcapping is not None:
            yield (
                f"`final_logit_softcapping` of the base model is {shown(softcapping)}; only None is supported: logits "
                "are the head's own."
            )
        if self.segment_alignment != "left" and self.generation_policy != "open":
            yield (
                f"`segment_alignment` is {self.segment_alignment!r} and `generation_policy` is "
                f"{self.generation_policy!r}: where segments are counted from the prompt's end, a generated token must "
                "not move them. Only generation_policy 'open' goes with it."
            )
        yield from self._wrong_positions()
        yield from self._wrong_windows()

    def _wrong_positions(self) -> Iterator[str]:
        base, layout = self.base_model_config, self.segment_layout
        if self.backbone.positions is None:
            if self.wrap_pos:
                yield (
                    f"`wrap_pos` is true, but a {base.model_type} has no learned positions to add those of memory "
                    "tokens to."
                )
            return
        if self.wrap_pos and self.learned_positions == "grow":
            yield "`wrap_pos` is true and `learned_positions` is 'grow'; only 'restart' goes with it."
        if self.segment_alignment != "left" and self.learned_positions == "grow":
            yield (
                f"`segment_alignment` is {self.segment_alignment!r} and `learned_positions` is 'grow': positions grow "
                "over segments of equal length only. Set `learned_positions` to 'restart' if the model was trained so."
            )
        needed = layout.tokens if self.wrap_pos else layout.rows
        if needed > base.max_position_embeddings:
            yield (
                f"A segment needs {needed} learned positions (`segment_size` {layout.tokens}"
                f"{'' if self.wrap_pos else ' and its memory tokens'}), but the base model has "
                f"{base.max_position_embeddings}. Use a smaller `segment_size`."
            )

    @property
    def _base_reaches(self) -> list[int | None]:
        """Per layer, the rows of the base model's own sliding window; None where it has none."""
        return self.backbone.reaches(self.base_model_config)

    @property
    def _rows_before(self) -> int:
        """How far a window reaches back behind the first row of a segment."""
        return (self.window_shift or self.segment_size) if self.window else 0

    def _wrong_windows(self) -> Iterator[str]:
        if self.sliding_window and not self.wrap_pos:
            yield (
                "`sliding_window` is true: that Transformer-XL cache of the first releases is defined for learned "
                "positions with `wrap_pos` only. Models with the newer code's sliding window have model_type 'armt_sw'."
            )
        if self.window is not None and self.segment_alignment != "left":
            yield (
                f"`segment_alignment` is {self.segment_alignment!r}: with a window into the segment before every "
                "segment but the last has to be full, which only 'left' gives."
            )
        local = [reach for reach in self._base_reaches if reach is not None]
        needed = self.segment_layout.rows + self._rows_before
        if self.window and local and min(local) < needed:
            yield (
                f"The base model attends within a sliding window of {min(local)} tokens, and its segments are to see "
                f"the one before: {needed} rows with their memory tokens. How far such layers reach over a boundary is "
                "defined nowhere: use a smaller `segment_size`, or a system without a window into the segment before."
            )
        if self.full_suffix and any(self.reaches):
            yield (
                f"The base model attends within a sliding window of {min(local)} tokens, less than a segment, and its "
                "memory tokens are to see one another (`memory_attention`); how far they do in such layers is defined "
                "nowhere. Use a smaller `segment_size`."
            )


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise Refused(
            f"{shown(name)} is not a floating-point torch dtype of weights; write {', '.join(map(repr, DTYPES))}."
        )
    return name
