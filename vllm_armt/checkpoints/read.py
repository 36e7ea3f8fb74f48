"""Reading the tensors of a checkpoint: one file or a directory, safetensors or torch.save, sharded or not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_armt.checkpoints.files import read_json, regular_file, shard_of
from vllm_armt.config.refused import Refused, shown, translated

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
        Refused: a file is damaged or holds something else than tensors, or shards contradict the index or are not
            beside it.
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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index} is not an index of shards: it must be JSON with a `weight_map` from tensors to files.")
    shards = {shard_of(index, name) for name in {shown(name): name for name in weight_map.values()}.values()}
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        tensors |= _read_file(shard)
    if tensors.keys() != weight_map.keys():
        differing = sorted(tensors.keys() ^ weight_map.keys())
        raise Refused(f"{index} and its shards do not list the same tensors; {differing[0]!r} is in one of them only.")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    # huggingface_hub's load_state_dict_from_file refuses what safetensors' save_model writes for tied weights, which is
    # how the research code saves, and its errors do not name the damaged file
    regular_file(path)
    if path.suffix == ".safetensors":
        with translated(f"{path} cannot be read, it is damaged or truncated"):
            return load_file(path)
    with translated(
        f"{path} cannot be read: it is damaged, truncated, or holds something else than tensors, which is not loaded "
        "for safety",
        quoting=False,  # torch says how to load it nevertheless
    ):
        tensors = _unpickle(path)
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
        raise Refused(
            f"{path} is not a state dict: it holds something else than named tensors. Save `model.state_dict()` alone."
        )
    return dict(tensors)


def _unpickle(path: Path) -> object:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch stores what it saves as it is; anything else may be larger than the file by any factor
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_named_tensor(name: object, tensor: object) -> bool:
    """Whether it is a tensor like those of safetensors: dense, with an element in the file for each of its own."""
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )
