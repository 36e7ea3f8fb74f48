"""The text model inside of a base model that sees images too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_TEXT_PARTS = {"gemma3": "gemma3_text"}
"""By `model_type`, that of the text model inside."""

_IN_TEXT_PART = "language_model."
_OF_BOTH = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that may stand beside `text_config` and hold for it."""


def text_part(raw: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors of the text model; of a base model that is nothing else, its own.

    Args:
        raw: config.json of the base model.
        tensors: by their names in its files, where those of the text model begin with `language_model.`.
    """
    model_type, text = raw.get("model_type"), raw.get("text_config")
    if not isinstance(model_type, str) or model_type not in _TEXT_PARTS or not isinstance(text, dict):
        return raw, tensors
    of_both = {key: raw[key] for key in _OF_BOTH if key in raw}
    named = {
        name.removeprefix(_IN_TEXT_PART): tensor for name, tensor in tensors.items() if name.startswith(_IN_TEXT_PART)
    }
    return of_both | text | {"model_type": _TEXT_PARTS[model_type]}, named
