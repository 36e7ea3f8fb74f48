"""Which version of the authors' code a config.json is of, and what it says in today's words.

All versions write `model_type: "armt"` and mostly the same names of tensors, and compute something else. Their keys
tell them apart, where two write the same the Python file beside them, and where that is missing whoever knows.

| version | of the authors' `modeling_amt/` | what it computes |
|---|---|---|
| today | `src/armt.py`, `src/armt_sw.py`, and what we write | see `ARMTConfig` |
| old | `inner_loop_old.py` | "armt_sw" with a window; without one "armt", if it was trained with flash attention |
| il08 | `inner_loop.py` | memory tokens that see one another, a window that slides with the rows |
| outer_loop | `model.py` | "armt" that never closes a prompt's last segment; tensors with the research code's names |
| thinking, memory_params, disjoint_memory, online_armt | the files of these names | not supported |
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from vllm_armt.config.code_beside import Code
from vllm_armt.config.refused import Refused, shown

logger = logging.getLogger(f"vllm.{__name__}")

Version = Literal["today", "old", "il08", "outer_loop", "thinking", "memory_params", "disjoint_memory", "online_armt"]
Confirmable = Literal["il08", "old"]
"""Versions that somebody can say a checkpoint is of where its files leave it open."""

OLD_KEYS = {"act_on", "act_type", "max_hop", "attend_to_previous_input"}
"""Keys of every version but today's."""

_UNSUPPORTED = {
    "thinking": "a ThinkingARMTForCausalLM (modeling_amt/thinking.py), which repeats layers and segments",
    "memory_params": (
        "a MemoryParamsARMTForCausalLM (modeling_amt/armt_memory_params.py), whose memory tokens pass decoder layers "
        "of their own"
    ),
    "disjoint_memory": (
        "modeling_amt/disjoint_memory.py or a first inner_loop.py, in which the learned memory tokens enter every "
        "layer anew"
    ),
    "online_armt": "modeling_amt/online_armt.py, in which every token writes to the memory",
}

CONVERT = "vllm-armt convert SRC DST"


def version_of(raw: Mapping[str, Any], code: Code | None = None, confirmed: Confirmable | None = None) -> Version:
    """The version of the authors' code that has written a config.json.

    Args:
        raw: its content, of a model whose `model_type` is "armt" or "armt_sw".
        code: what the Python file beside it shows.
        confirmed: what somebody says who knows; it counts where the files leave it open.

    Raises:
        Refused: it can't be told, or it is another than was said.
    """
    version = _told_by_keys(raw)
    if version == "il08":
        # disjoint_memory writes the same keys, class and names of tensors
        if code == "disjoint_memory":
            version = "disjoint_memory"
        elif code != "il08" and confirmed != "il08" and not raw.get("auto_map"):
            raise Refused(
                "By its keys (`sliding_window` beside `act_on`) the config.json is of modeling_amt/inner_loop.py "
                "(il08) or of modeling_amt/disjoint_memory.py, which write the same and compute something else; only "
                "the Python file that stood beside it tells them apart, and there is none. If it is the former, "
                f"{CONVERT} --code-version il08 writes a checkpoint that says so."
            )
    if version == "old" and not raw["sliding_window_enabled"] and confirmed != "old":
        attention = raw.get("attn_implementation")
        if not (isinstance(attention, str) and attention.startswith("flash")):
            raise Refused(
                "The config.json is of modeling_amt/inner_loop_old.py without a window, and `attn_implementation` is "
                f"{shown(attention)}: with anything but flash attention that code has no causal mask, so that tokens "
                "see what comes after them, which is not supported. If the model was trained with flash attention all "
                f"the same, {CONVERT} --code-version old writes a checkpoint that says so."
            )
    if confirmed not in (None, version):
        raise Refused(f"--code-version is {confirmed!r}, but by its files the checkpoint is of version {version!r}.")
    return version


def _told_by_keys(raw: Mapping[str, Any]) -> Version:
    name = _class_name(raw)
    if name.startswith("Thinking") or {"reading_depth_multiplier", "writing_depth_multiplier"} & raw.keys():
        return "thinking"
    if name.startswith("MemoryParams") or "freeze_base_model" in raw:
        return "memory_params"
    if not OLD_KEYS & raw.keys():
        return "today"
    has_window, has_old_window = "sliding_window" in raw, "sliding_window_enabled" in raw
    if name == "ARMTForCausalLM" and has_window and not has_old_window:
        return "outer_loop"
    if has_window != has_old_window and name in ("", "InnerLoopARMTForCausalLM"):
        return "il08" if has_window else "old"
    if raw.get("act_on") or raw.get("attend_to_previous_input"):
        # refused in any version, beside whatever else is wrong
        return "today"
    raise Refused(
        f"`architectures` is {shown(raw.get('architectures'))} beside keys of the authors' older code "
        f"({', '.join(sorted(OLD_KEYS & raw.keys()))}), and `sliding_window` and `sliding_window_enabled` are "
        f"{shown(raw.get('sliding_window', 'absent'))} and {shown(raw.get('sliding_window_enabled', 'absent'))}: no "
        f"version that is known writes this. Known are {', '.join(get_args(Version))}."
    )


def _class_name(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def refuse_unsupported(version: Version) -> None:
    """Refuse a version that can't be computed.

    Raises:
        Refused: it is one; the message says what it is.
    """
    if version in _UNSUPPORTED:
        raise Refused(
            f"The checkpoint is of {_UNSUPPORTED[version]}. That is other mathematics, which vllm-armt does not "
            "compute: run it with the authors' code."
        )


def refuse_raw_layers(keys: Iterable[str], wrap_layers: Any) -> None:
    """Refuse layers without a wrapper in a config.json with keys of an older version.

    Raises:
        Refused: there is one.
    """
    old = sorted(set(keys) & (OLD_KEYS | {"sliding_window_enabled"}))
    if old and isinstance(wrap_layers, list) and not all(wrap_layers):
        raise Refused(
            f"`wrap_layers` leaves layers out and the config is an old one (it has {', '.join(old)}): there such "
            "layers attend over the whole text, which is not supported."
        )


def refuse_untried_base(version: Version, base: str, has_learned_positions: bool) -> None:
    """Refuse a base model, of type `base`, around which a version was never run.

    Raises:
        Refused: it is one.
    """
    if version == "il08" and has_learned_positions:
        raise Refused(
            f"The config.json is of the authors' modeling_amt/inner_loop.py (il08) around a {base}, which has learned "
            "positions: what that code computes with them was never run, so it is not supported."
        )


def in_todays_words(raw: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """The fields of today's configuration that say what a config.json of an older version does.

    Args:
        raw: its content.
        version: which one.

    Raises:
        Refused: the version is not supported, or is one whose tensors have other names.
    """
    refuse_unsupported(version)
    if version == "today":
        return dict(raw)
    if version == "outer_loop":
        raise Refused(
            "The config.json is of the authors' modeling_amt/model.py, whose tensors have other names "
            f"(armt.memory_cell.*): {CONVERT} writes a checkpoint with today's."
        )
    refuse_raw_layers(raw, raw.get("wrap_layers"))
    # what is on stays there, to be refused with whatever else is wrong
    gone = {"architectures", "auto_map", "act_type", "max_hop"}
    gone |= {key for key in ("act_on", "attend_to_previous_input") if raw.get(key) in (False, None)}
    fields = {key: value for key, value in raw.items() if key not in gone}
    window = fields.pop("sliding_window_enabled" if version == "old" else "sliding_window")
    if not isinstance(window, bool):
        raise Refused(f"The window of the config.json is {shown(window)}; it must be true or false.")
    fields["model_type"] = "armt_sw" if window else "armt"
    fields["architectures"] = ["ARMTSlidingWindowForCausalLM" if window else "ARMTForCausalLM"]
    if version == "il08":
        fields["memory_attention"] = "full"
        if window:
            fields |= {"window_edge": "rows", "window_positions": "grow"}
        # of `memory`, which that code makes in the dtype of the embeddings
        fields.setdefault("model_dtype", raw.get("dtype") or raw.get("torch_dtype"))
        logger.info(
            "config.json is of the authors' modeling_amt/inner_loop.py (il08): memory tokens see one another%s.",
            ", and the window slides with the rows of a segment" if window else "",
        )
    return fields
