"""The names of the authors' research checkpoints, and the names that the same parameters have in ours.

Three spellings are on disk, all of one wrapper:

| written by | decoder layer i of ARMT and PRMT | tied embedding |
|---|---|---|
| `torch.save` | `memory_cell.layers.i.*` and `memory_cell.model.<layers>.i.*` | both names |
| `safetensors.torch.save_model` | `memory_cell.layers.i.*` | `memory_cell.model.<head>` |
| `accelerate.save_model` | `memory_cell.model.<layers>.i.*` | `memory_cell.model.<embeddings>` |

There a layer is a wrapper around the base model's own (`layer.*`). An RMT wraps no layers: they are
`memory_cell.model.<layers>.i.*` in every spelling.

Around them may stand `armt.` (a class of theirs that holds the wrapper), `student.` beside `teacher.*`
(distillation), and PEFT's `base_model.model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from vllm_armt.config import Refused

_OLD_BUFFERS = re.compile(r"\brotary_emb\.inv_freq$|\b(attn|attention)\.(bias|masked_bias)$")
"""Constants that transformers once saved; they follow from the configuration."""

_LAYER_MEMORY = re.compile(r"\.\d+\.memory$")


def is_old_buffer(name: str) -> bool:
    """Whether a tensor is one of the constants that transformers once saved."""
    return _OLD_BUFFERS.search(name) is not None


def is_research(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names was saved from the authors' research wrapper."""
    return any("memory_cell." in name for name in names)


def system_of(names: Iterable[str]) -> str:
    """The system that has tensors of these names, theirs or ours: "armt", "prmt" or "rmt"."""
    names = list(names)
    if any(".W_mq." in name for name in names):
        return "armt"
    return "prmt" if any(_LAYER_MEMORY.search(name) for name in names) else "rmt"


def to_hf_names(tensors: dict[str, Tensor], layers: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a research checkpoint's tensors, each parameter once.

    Left out are a teacher beside its student, constants that transformers once saved, and a PRMT's
    `memory_cell.memory`: its first layer writes its own memory over it, so it never has an effect.

    Args:
        tensors: by their names in the file.
        layers: where the base model keeps its decoder layers, for instance "model.layers".

    Returns:
        The tensors by our names, LoRA adapters with PEFT's endings; and the names of those left out.

    Raises:
        ValueError: a name belongs to no part of a wrapper, or two names of one parameter hold different
            values.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not is_old_buffer(key)}
    if any(key.startswith("student.") for key in kept):
        kept = {key: tensor for key, tensor in kept.items() if not key.startswith("teacher.")}
    if system_of(kept) == "prmt":
        kept = {key: tensor for key, tensor in kept.items() if not key.endswith("memory_cell.memory")}
    renamed: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for key, tensor in kept.items():
        name = _hf_name(key, layers)
        if name in renamed and not _identical(renamed[name], tensor):
            raise Refused(
                f"{source[name]!r} and {key!r} are two names of one parameter, but their values differ. "
                "One of them is stale, and the file does not say which."
            )
        renamed[name], source[name] = tensor, key
    return renamed, sorted(tensors.keys() - kept.keys())


def _hf_name(key: str, layers: str) -> str:
    name = key.removeprefix("student.").removeprefix("armt.")
    if name in ("memory_cell.memory", "memory_cell.sink"):
        return name.removeprefix("memory_cell.")
    if name.startswith("memory_cell.layers."):
        return f"model.{layers}." + name.removeprefix("memory_cell.layers.")
    if name.startswith("memory_cell.model."):
        return "model." + name.removeprefix("memory_cell.model.").removeprefix("base_model.model.")
    raise Refused(f"Unexpected tensor {key!r}: it belongs to no part of the authors' wrapper.")


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
