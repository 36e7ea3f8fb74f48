"""What `convert` and `init` print of the model that they wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_armt.config import RecurrentConfig

_SHOWN = (
    ("segment_size", "num_mem_tokens", "d_mem", "n_heads", "gating"),
    ("variant", "correction", "use_denom", "aliased", "use_sink", "generation_policy", "segment_alignment"),
    ("wrap_pos", "learned_positions", "sliding_window"),
)
"""Fields of a configuration by line; those that the system does not have are left out."""

_ATTENTION = ("memory_attention", "window_edge", "window_positions")
"""Shown where memory tokens see one another, or there is a window."""

TOKEN_IDS = 'send token ids to /v1/completions: {"prompt": [1, 2, 3], "return_token_ids": true, ...}'
"""What a server without a tokenizer understands."""


def summary(config: RecurrentConfig, dst: Path) -> list[str]:
    """Lines that say which model is in `dst`; positions only where the base model has learned ones."""
    base = config.base_model_config
    shown = _SHOWN if config.backbone.positions else _SHOWN[:-1]
    lines = [f"{dst}: {config.model_type} on {base.model_type}, {base.num_hidden_layers} layers, {config.model_dtype}"]
    lines += ["  " + ", ".join(f"{n} {getattr(config, n)}" for n in names if hasattr(config, n)) for names in shown]
    if config.full_suffix or config.window in ("tokens", "rows"):
        lines.append("  " + ", ".join(f"{n} {getattr(config, n)}" for n in _ATTENTION if hasattr(config, n)))
    remembering = getattr(config, "has_memory", [True])
    if not all(remembering):
        lines.append(f"  memory in layers {', '.join(str(i) for i, has in enumerate(remembering) if has)} only")
    return lines


def serving(dst: Path) -> str:
    """The command that serves a directory; without a tokenizer vLLM has to be told that there is none."""
    from vllm_armt.checkpoints.directory import has_tokenizer

    return f"vllm serve {shlex.quote(str(dst))}" + ("" if has_tokenizer(dst) else " --skip-tokenizer-init")
