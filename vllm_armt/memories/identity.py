"""Whose memories they are: a fingerprint of all that the state of a page depends on, and the store of that model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import vllm
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

import vllm_armt
from vllm_armt.memories.checkpoint import IRRELEVANT, checkpoint_identity, fingerprint_of, introduce
from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import Model
from vllm_armt.memories.disk.store import Store
from vllm_armt.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_armt.config import RecurrentConfig


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
        **_read_otherwise(config),
        **checkpoint_identity(checkpoint, directory, model.hf_overrides),
    }
    if vllm_config.load_config.load_format not in ("auto", "safetensors", "hf"):
        # made-up weights, for instance
        identity["load_format"] = str(vllm_config.load_config.load_format)
    name = model.served_model_name
    versions = {"vllm": vllm.__version__, "vllm-armt": vllm_armt.__version__, "torch": torch.__version__}
    return Model(fingerprint_of(identity), name if isinstance(name, str) else str(model.model), identity, versions)


def _read_otherwise(config: RecurrentConfig) -> dict[str, str]:
    """What a state depends on that the checkpoint's config.json does not spell out.

    One of an older version of the authors' code says by keys of its own who sees whom, and may hold no more of its base
    model than a name.
    """
    found = {}
    if config.full_suffix or config.window == "rows" or config.window_shift:
        suffix = "full" if config.full_suffix else "causal"
        found["attention"] = f"memory {suffix}, window {config.window} {config.window_shift} back"
    if config.base_model_name is not None:
        base = config.base_model_config.to_dict()
        found["base"] = fingerprint_of({key: str(value) for key, value in base.items() if key not in IRRELEVANT})
    return found


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
    store = Store(directory, model, max_bytes=options.memories_max_bytes)
    introduce(store)
    return store


def _checkpoint(vllm_config: VllmConfig) -> Path:
    """The folder of weights; one of a hub's is downloaded, as vLLM would do a moment later."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if (folder := Path(model.model)).is_dir():
        return folder
    patterns = ["*.safetensors", "config.json"]
    return Path(download_weights_from_hf(model.model, load.download_dir, patterns, model.revision))
