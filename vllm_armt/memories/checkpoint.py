"""What a checkpoint's folder tells of whose memories they are, and the models that a folder of memories knows.

Nothing here needs vLLM, so that a command which only looks at memories need not wait for it.

    DIR/weights.json                  digests of weights (below)
    DIR/<fingerprint>/model.json      the model whose memories these are, sealed: left by every server that opens them

The weights are hashed whole, once: digests are kept in the folder of memories by path, size and time of modification of
the files, so that a server which starts again only asks the file system. SHA-256 takes 0.5 to 2 s for a GB, files side
by side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import Model
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.errors import Damaged, MemoriesError

logger = logging.getLogger(f"vllm.{__name__}")

DIGESTS = "weights.json"
MODEL = "model.json"
IRRELEVANT = {"transformers_version", "_name_or_path", "max_context", "dtype", "torch_dtype", "architectures"}
"""Fields of a configuration that no state depends on; the dtype that is served in is taken from vLLM."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed less long ago may be changed again without a new time of modification."""


def checkpoint_identity(
    checkpoint: Path, directory: Path, hf_overrides: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The part of `Model.identity` that depends on the checkpoint and not on how it is served.

    Args:
        checkpoint: its folder.
        directory: of memories, where digests of weights are kept.
        hf_overrides: vLLM's, an object.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it has no config.json.")
    return {
        "config": _digest_of(_relevant(json.loads(file.read_text())), dict(hf_overrides or {})),
        "weights": weights_digest(checkpoint, directory / DIGESTS),
    }


def fingerprint_of(identity: Mapping[str, str]) -> str:
    """32 hexadecimal digits."""
    return _digest_of(dict(identity))[:32]


def introduce(store: Store) -> None:
    """Write down whose memories a store holds, unless that is written already."""
    file = store.catalog.directory / MODEL
    try:
        if json.loads(files.unseal(file, file.read_bytes()))["identity"] == dict(store.model.identity):
            return
    except (OSError, Damaged):
        pass
    try:
        with files.in_words(f"writing {file}"), files.new_file(file, time.time_ns()) as fd:
            files.write_all(fd, files.seal(json.dumps(asdict(store.model)).encode()))
    except MemoriesError as error:
        # a folder that is only read from
        logger.warning("The command line will not find these memories. %s", error)


def known_models(directory: Path) -> Sequence[Model]:
    """The models whose memories a folder holds.

    Raises:
        Damaged: what was written down of one isn't as it was.
        StorageFailed: the folder can't be read.
    """
    found = []
    with files.in_words(f"looking through {directory}"):
        for folder in sorted(directory.iterdir()):
            file = folder / MODEL
            if folder.is_symlink() or not file.is_file():
                continue
            model = Model(**json.loads(files.unseal(file, file.read_bytes())))
            if model.fingerprint != folder.name:
                raise Damaged(f"{file} is not at its place: it is that of {model.fingerprint}.")
            found.append(model)
    return found


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


def _relevant(config: Any) -> Any:
    """A configuration, and those within it, without what is irrelevant."""
    if not isinstance(config, dict):
        return config
    return {key: _relevant(value) for key, value in config.items() if key not in IRRELEVANT}


def _digest_of(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
