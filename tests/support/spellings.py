"""The three ways in which the authors' tools write one wrapper's state dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.research_checkpoint import Case

LAYERS = "memory_cell.layers."
HEADS, EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "embed_in", "wte")


def state_dict(case: Case) -> dict[str, Tensor]:
    """The wrapper's whole state dict, every parameter under all its names, in the authors' order."""
    keys = json.loads((case.golden.path / "state_dict_keys.json").read_text())
    inner = f"memory_cell.model.{case.args['layers_attr']}."
    ends = [key for key in keys if key.split(".")[-2] in HEADS + EMBEDDINGS]

    def names(key: str) -> list[str]:
        return [key, key.replace(LAYERS, inner), key.replace(inner, LAYERS), *(ends if key in ends else [])]

    return {key: next(case.tensors[name] for name in names(key) if name in case.tensors) for key in keys}


def hf_names(case: Case) -> dict[str, Tensor]:
    """The same tensors by our names, each once."""
    everything = state_dict(case)
    head, embeddings = (next(k for k in everything if k.split(".")[-2] in part) for part in (HEADS, EMBEDDINGS))
    ours = {
        "model." + key.removeprefix("memory_cell.model."): tensor
        for key, tensor in everything.items()
        if key.startswith("memory_cell.model.") and (key != head or not torch.equal(tensor, everything[embeddings]))
    }
    return ours if case.golden.system == "prmt" else ours | {"memory": everything["memory_cell.memory"]}


def torch_save(case: Case, folder: Path) -> Path:
    """Everything under all its names."""
    torch.save(state_dict(case), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def save_model(case: Case, folder: Path) -> Path:
    """`safetensors.torch.save_model`: of several names the first in the alphabet."""
    return _once(case, folder, sorted)


def accelerate(case: Case, folder: Path) -> Path:
    """`accelerate.save_model`: of several names the first in the state dict."""
    return _once(case, folder, list)


SPELLINGS = (torch_save, save_model, accelerate)


def _once(case: Case, folder: Path, order: Callable[[dict[str, Tensor]], list[str]]) -> Path:
    tensors = state_dict(case)
    first: dict[int, str] = {}
    for name in order(tensors):
        first.setdefault(tensors[name].data_ptr(), name)
    save_file({name: tensors[name] for name in first.values()}, folder / "model.safetensors")
    return folder / "model.safetensors"
