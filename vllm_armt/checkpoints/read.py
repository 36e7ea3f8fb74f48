"""Reading the tensors of a checkpoint: one file or a directory, safetensors or torch.save, sharded or not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers, accelerate and the authors' trainer call the weights of a directory, in order of preference."""


def read_tensors(src: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, as they are stored.

    Args:
        src: a weights file (*.safetensors, or torch.save's *.bin, *.pt, *.pth), an index of shards
            (*.index.json), or a directory with one of `WEIGHT_FILES`.

    Raises:
        OSError: there is no such file.
        ValueError: a file is damaged or holds something else than tensors, or shards contradict the index.
    """
    if not src.is_dir():
        return _read_sharded(src) if src.name.endswith(".index.json") else _read_file(src)
    for name in WEIGHT_FILES:
        if (src / name).exists():
            return read_tensors(src / name)
    raise FileNotFoundError(
        f"{src} has none of {', '.join(WEIGHT_FILES)}. If its weights have another name, give that file as SRC."
    )


def _read_sharded(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index} is not an index of shards: it must be JSON with a `weight_map`.") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors |= _read_file(index.parent / name)
    if tensors.keys() != weight_map.keys():
        differing = sorted(tensors.keys() ^ weight_map.keys())
        raise ValueError(
            f"{index} and its shards do not list the same tensors; {differing[0]!r} is in one of them only."
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    # huggingface_hub's load_state_dict_from_file refuses what safetensors' save_model writes for tied weights, which is
    # how the research code saves, and its errors do not name the damaged file
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, truncated, or holds something else than tensors, which is not "
            "loaded for safety."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"{path} is not a state dict: it holds something else than named tensors. Save `model.state_dict()` alone."
        )
    return dict(tensors)
