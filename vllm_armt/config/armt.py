"""Configurations of the systems with an associative memory in every layer: ARMT, and ARMT with a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from vllm_armt.config.base import RecurrentConfig
from vllm_armt.config.code_beside import code_beside
from vllm_armt.config.refused import Refused
from vllm_armt.config.versions import in_todays_words, refuse_raw_layers, refuse_untried_base, version_of
from vllm_armt.core import MemoryRule, Window

VARIANTS = ("v1", "v2")
MEMORY_ATTENTIONS = ("causal", "full")
WINDOW_EDGES = ("tokens", "rows")
WINDOW_POSITIONS = ("restart", "grow")


class ARMTConfig(RecurrentConfig):
    """Configuration of an associative recurrent memory transformer, field-compatible with the authors' newest code.

    Args:
        d_mem: p, width of the memory's queries and keys before the feature map.
        n_heads: h, heads of the memory; each has p/h of the queries and d/h of the values.
        gating: beta per channel of the values instead of per memory token.
        correction, use_denom: see `MemoryRule`.
        variant: "v1" (phi as it is, the 2024 releases) or "v2" (phi normalised, everything newer).
        wrap_layers: per layer, whether it has a memory; null for all.
        use_sink: a learned row stands before every segment.
        memory_attention: which memory tokens of its segment a memory token sees: itself and those before ("causal"),
            or all ("full").
        others: see `RecurrentConfig`.
    """

    model_type = "armt"
    architecture = "ARMTForCausalLM"
    choices: ClassVar[dict[str, tuple[str, ...]]] = RecurrentConfig.choices | {
        "variant": VARIANTS,
        "memory_attention": MEMORY_ATTENTIONS,
    }
    required: ClassVar[dict[str, str]] = RecurrentConfig.required | {"d_mem": "the width of memory queries and keys"}

    d_mem: Any = None
    n_heads: int = 1
    gating: bool = False
    correction: bool = True
    use_denom: bool = True
    variant: str = "v2"
    wrap_layers: list[bool] | None = None
    use_sink: bool = False
    memory_attention: str = "causal"
    state_dtype: str | None = "float32"
    learned_positions: str = "grow"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The configuration of a config.json of any version of the authors' code; see transformers.

        Raises:
            Refused: it is of a version that is not supported, or has faults.
        """
        # known where transformers opens a directory
        beside = Path(str(kwargs.get("name_or_path") or ""))
        version = version_of(config_dict, code_beside(beside) if beside.name and beside.is_dir() else None)
        fields = in_todays_words(config_dict, version)
        # an older version says by a key what is a system of its own today
        is_another = fields.get("model_type") == ARMTSWConfig.model_type and not issubclass(cls, ARMTSWConfig)
        made: Any = ARMTSWConfig.from_dict(fields, **kwargs) if is_another else super().from_dict(fields, **kwargs)
        opened = made[0] if isinstance(made, tuple) else made
        refuse_untried_base(version, opened.base_model_config.model_type, opened.backbone.positions is not None)
        return made

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_raw_layers(kwargs, self.wrap_layers)
        if kwargs.pop("sliding_window_enabled", False) and self.model_type == "armt":
            raise Refused(
                "The config asks for a sliding window (`sliding_window_enabled`): that is model_type 'armt_sw', not "
                "'armt'. `from_dict` and `from_pretrained` read it so."
            )
        if self.wrap_pos:
            self.learned_positions = "restart"
        super().__post_init__(**kwargs)

    @property
    def memory_rule(self) -> MemoryRule:
        """How this checkpoint's memory is read and written."""
        return MemoryRule(self.variant == "v2", self.correction, self.use_denom, self.n_heads)

    @property
    def prefix_rows(self) -> int:
        return int(self.use_sink)

    @property
    def full_suffix(self) -> bool:
        return self.memory_attention == "full"

    @property
    def has_memory(self) -> list[bool]:
        """Per layer, whether it has an associative memory."""
        return self.wrap_layers or [True] * self.base_model_config.num_hidden_layers

    @property
    def feature_size(self) -> int:
        """K, the width of the feature map, all heads together."""
        return self.memory_rule.feature_size(self.d_mem)

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        h, K = self.n_heads, self.feature_size
        return {"M": (h, K // h, self.base_model_config.hidden_size // h), "z": (h, K // h)}

    @property
    def beta_size(self) -> int:
        """Width of beta: one a head, or one a channel with gating."""
        return self.base_model_config.hidden_size if self.gating else self.n_heads

    def _inconsistencies(self) -> Iterator[str]:
        yield from super()._inconsistencies()
        base = self.base_model_config
        if self.wrap_layers is not None and len(self.wrap_layers) != base.num_hidden_layers:
            yield (
                f"`wrap_layers` has {len(self.wrap_layers)} entries, but the base model has "
                f"{base.num_hidden_layers} layers."
            )
        if self.d_mem % self.n_heads or base.hidden_size % self.n_heads:
            yield (
                f"`n_heads` is {self.n_heads}; it must divide d_mem ({self.d_mem}) and the hidden size "
                f"({base.hidden_size})."
            )
        if self.variant == "v1" and (self.n_heads > 1 or self.gating):
            yield "`n_heads` above 1 and `gating` exist from variant 'v2' on; this config says 'v1'."
        if self.variant == "v2" and self.sliding_window:
            yield (
                "`sliding_window` with variant 'v2' is another mask than that of the first releases and not supported; "
                "a model of the newest code with a sliding window has model_type 'armt_sw'."
            )


class ARMTSWConfig(ARMTConfig):
    """Configuration of an ARMT whose attention reaches one window back into the segment before.

    Args:
        window_edge: with what the window slides, "tokens" or "rows"; see `Window`.
        window_positions: where the keys of the segment before lie. "restart": where they lay in their own, so that
            token i and the i-th of them are at one position; "grow": as far back as they are, by all rows of a segment.
            Null for what the authors' newest code does, which is "grow" around a Gemma and "restart" else.
        others: see `ARMTConfig`.
    """

    model_type = "armt_sw"
    architecture = "ARMTSlidingWindowForCausalLM"
    choices: ClassVar[dict[str, tuple[str, ...]]] = ARMTConfig.choices | {
        "window_edge": WINDOW_EDGES,
        "window_positions": WINDOW_POSITIONS,
    }

    window_edge: str = "tokens"
    window_positions: str | None = None

    @property
    def window(self) -> Window | None:
        return "rows" if self.window_edge == "rows" else "tokens"

    @property
    def window_shift(self) -> int:
        positions = self.window_positions
        if positions is None:
            positions = "grow" if self.base_model_config.model_type == "gemma" else "restart"
        return self.segment_layout.rows if positions == "grow" else 0

    def _inconsistencies(self) -> Iterator[str]:
        yield from super()._inconsistencies()
        if self.window_shift and self.backbone.positions is not None:
            yield (
                "`window_positions` is 'grow', but a "
                f"{self.base_model_config.model_type} has learned positions, not rotary ones, and `learned_positions` "
                "says how those go on. Leave it out."
            )
        if self.generation_policy == "open" or self.wrap_pos or self.n_heads > 1 or self.gating or self.variant == "v1":
            yield (
                "model_type 'armt_sw' has generation_policy 'commit', variant 'v2', one memory head, no gating and no "
                "`wrap_pos`: the authors' code knows no others."
            )
