"""Whose memories they are: a fingerprint of all that the state of a page depends on, and the store that belongs to it.

The weights are hashed whole, once: digests are kept in the folder of memories by path, size and time of modification of
the files, so that a server which starts again only asks the file system. SHA-256 takes 0.5 to 2 s for a GB, files side
by side.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

import vllm_armt
from vllm_armt.config.options import Options
from vllm_armt.memories import files
from vllm_armt.memories.errors import Damaged, MemoriesError
from vllm_armt.memories.manifest import Model
from vllm_armt.memories.store import Store

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

DIGESTS = "weights.json"
IRRELEVANT = {"transformers_version", "_name_or_path", "max_context", "dtype", "torch_dtype", "architectures"}
"""Fields of a configuration that no state depends on; the dtype that is served in is taken from vLLM."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed less long ago may be changed again without a new time of modification."""


def identify(vllm_config: VllmConfig, directory: Path) -> Model:
    """Whose memories a server keeps.

    Args:
        vllm_config: of the server.
        directory: of memories, where digests of weights are kept.

    Raises:
        ValueError: it can't be told.
        StorageFailed: the folder can't be made.
    """
    if callable(vllm_config.model_config.hf_overrides):
        raise ValueError(
            "With hf_overrides that are a function it can't be told whose memories they are; give an object."
        )
    with files.in_words(f"making the folder {directory}"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    model = vllm_config.model_config
    config, checkpoint = model.hf_config, _checkpoint(vllm_config)
    served = str(model.dtype).removeprefix("torch.")
    identity = {
        "system": config.model_type,
        "segment_size": str(config.segment_size),
        "dtype": served,
        "state_dtype": config.state_dtype or served,
        "config": _digest_of(_relevant(json.loads((checkpoint / "config.json").read_text())), model.hf_overrides),
        "weights": weights_digest(checkpoint, directory / DIGESTS),
    }
    if vllm_config.load_config.load_format not in ("auto", "safetensors", "hf"):
        # made-up weights, for instance
        identity["load_format"] = str(vllm_config.load_config.load_format)
    name = model.served_model_name
    versions = {"vllm": vllm.__version__, "vllm-armt": vllm_armt.__version__, "torch": torch.__version__}
    return Model(_digest_of(identity)[:32], name if isinstance(name, str) else str(model.model), identity, versions)


def open_store(vllm_config: VllmConfig, model: Model | None = None) -> Store:
    """The memories of a server, as its options say; in any process that has its configuration.

    Args:
        vllm_config: with the option `memories`.
        model: whose they are, if that is known.

    Raises:
        ValueError: the option is not given.
        StorageFailed: the folder can't be made.
    """
    options = Options.of(vllm_config)
    directory = options.memories_directory
    if directory is None:
        raise ValueError('This server keeps no memories: additional_config["armt"]["memories"] names no folder.')
    if model is None:
        known = vllm_config.kv_transfer_config and vllm_config.kv_transfer_config.kv_connector_extra_config.get("model")
        model = Model(**known) if known else identify(vllm_config, directory)
    return Store(directory, model, max_bytes=options.memories_max_bytes)


def weights_digest(checkpoint: Path, known: Path) -> str:
    """SHA-256 of a checkpoint's files of weights, by name.

    Args:
        checkpoint: the folder.
        known: file with digests of before; those that are computed are added to it.
    """
    patterns = ("*.safetensors", "*.bin", "*.pt")
    weights = next((found for pattern in patterns if (found := sorted(checkpoint.glob(pattern)))), [])
    if not weights:
        raise ValueError(f"{checkpoint} holds no weights (*.safetensors), so it can't be told whose memories they are.")
    before = _read_digests(known)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda file: _entry(file, before), weights))
    new = {str(file.resolve()): entry for file, entry in zip(weights, entries, strict=True)}
    if any(before.get(path) != entry for path, entry in new.items()):
        _write_digests(known, before | new)
    return _digest_of({file.name: entry[2] for file, entry in zip(weights, entries, strict=True)})


def _entry(file: Path, known: dict[str, list[Any]]) -> list[Any]:
    """Size, time of modification in ns, and SHA-256 of a file."""
    state = file.stat()
    entry = known.get(str(file.resolve()))
    if entry is not None and entry[:2] == [state.st_size, state.st_mtime_ns]:
        return entry
    logger.info("Hashing %s (%.2f GB), once, to know its memories again.", file, state.st_size / 1e9)
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return [state.st_size, state.st_mtime_ns, digest]


def _read_digests(known: Path) -> dict[str, list[Any]]:
    try:
        return json.loads(files.unseal(known, known.read_bytes()))
    except (OSError, Damaged):
        return {}


def _write_digests(known: Path, entries: dict[str, list[Any]]) -> None:
    settled = {path: entry for path, entry in entries.items() if time.time_ns() - entry[1] > _SETTLED_NS}
    try:
        with files.in_words(f"writing {known}"), files.new_file(known, time.time_ns()) as fd:
            files.write_all(fd, files.seal(json.dumps(settled).encode()))
    except MemoriesError as error:
        # a folder that is only read from: the next start hashes again
        logger.warning("The digests of the weights are not kept. %s", error)


def _checkpoint(vllm_config: VllmConfig) -> Path:
    """The folder of weights; one of a hub's is downloaded, as vLLM would do a moment later."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if (folder := Path(model.model)).is_dir():
        return folder
    patterns = ["*.safetensors", "config.json"]
    return Path(download_weights_from_hf(model.model, load.download_dir, patterns, model.revision))


def _relevant(config: Any) -> Any:
    """A configuration, and those within it, without what is irrelevant."""
    if not isinstance(config, dict):
        return config
    return {key: _relevant(value) for key, value in config.items() if key not in IRRELEVANT}


def _digest_of(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
