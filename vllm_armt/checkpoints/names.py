"""The names of the authors' research checkpoints, and the names that the same parameters have in ours.

Three spellings are on disk, all of one wrapper whose layers hang in two places:

| written by | decoder layer i | tied embedding |
|---|---|---|
| `torch.save` | `memory_cell.layers.i.*` and `memory_cell.model.<layers_attr>.i.*` | both names |
| `safetensors.torch.save_model` | `memory_cell.layers.i.*` | `memory_cell.model.lm_head` |
| `accelerate.save_model` | `memory_cell.model.<layers_attr>.i.*` | `memory_cell.model.model.embed_tokens` |

Around them may stand `armt.` (a class of theirs that holds the wrapper), `student.` beside `teacher.*`
(distillation), and PEFT's `base_model.model.`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_OLD_BUFFERS = re.compile(r"\brotary_emb\.inv_freq$|\battn\.(bias|masked_bias)$")
"""Constants that transformers once saved; they follow from the configuration."""


def to_hf_names(tensors: dict[str, Tensor], layers_attr: str) -> dict[str, Tensor]:
    """Rename a research checkpoint's tensors, each parameter once.

    Args:
        tensors: by their names in the file.
        layers_attr: where the base model keeps its decoder layers, for instance "model.layers".

    Returns:
        The tensors by our names; LoRA adapters keep PEFT's endings.

    Raises:
        ValueError: the checkpoint is not an ARMT, a name belongs to none, or two names of one
            parameter hold different values.
    """
    if any(key.startswith("student.") for key in tensors):
        tensors = {k.removeprefix("student."): v for k, v in tensors.items() if not k.startswith("teacher.")}
    _refuse_foreign(tensors)
    renamed: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        if _OLD_BUFFERS.search(key):
            continue
        name = _hf_name(key, layers_attr)
        if name in renamed and not _identical(renamed[name], tensor):
            raise ValueError(
                f"{source[name]!r} and {key!r} are two names of one parameter, but their values differ. "
                "One of them is stale, and the file does not say which."
            )
        renamed[name], source[name] = tensor, key
    return renamed


def _hf_name(key: str, layers_attr: str) -> str:
    name = key.removeprefix("armt.")
    if name == "memory_cell.memory":
        return "memory"
    if name.startswith("memory_cell.layers."):
        return f"model.{layers_attr}." + name.removeprefix("memory_cell.layers.")
    if name.startswith("memory_cell.model."):
        return "model." + name.removeprefix("memory_cell.model.").removeprefix("base_model.model.")
    raise ValueError(f"Unexpected tensor {key!r}: it belongs to no part of an ARMT wrapper.")


def _refuse_foreign(tensors: dict[str, Tensor]) -> None:
    if not any("memory_cell." in key for key in tensors):
        raise ValueError(
            "This is not a checkpoint of the authors' wrapper: no tensor's name has `memory_cell.` in it (the first is "
            f"{next(iter(tensors), 'absent')!r}). To put a fresh memory around a base model use `vllm-armt init`."
        )
    if not any(".W_mq." in key for key in tensors):
        raise ValueError(
            "No layer has an associative memory (no tensor's name has `.W_mq.` in it): this is an RMT or a PRMT, "
            "and only ARMT can be converted."
        )


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
