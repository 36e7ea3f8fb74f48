"""A directory that is to be served: its config.json, its weights and its tokenizer, all faults at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME

from vllm_armt.checkpoints.assemble import faults, skeleton, unsound
from vllm_armt.checkpoints.directory import has_tokenizer
from vllm_armt.checkpoints.files import read_json, regular_file
from vllm_armt.checkpoints.looks import refuse_other_base
from vllm_armt.checkpoints.names import is_old_buffer, is_research
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.systems import SYSTEMS
from vllm_armt.config import BACKBONES, RecurrentConfig, Refused
from vllm_armt.doctor.findings import Finding


def checkpoint(directory: Path) -> tuple[list[Finding], RecurrentConfig | None]:
    """What is found in a directory, and the configuration that it is served by; None where it can't be."""
    config, found = _config(directory)
    found = [*found, *_weights(directory, config), _tokenizer(directory)]
    return found, None if any(finding.state == "wrong" for finding in found) else config


def _config(directory: Path) -> tuple[RecurrentConfig | None, list[Finding]]:
    about = CONFIG_NAME
    try:
        raw = read_json(directory / CONFIG_NAME)
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in SYSTEMS:
            return None, [Finding(about, "wrong", _no_system(directory, raw))]
        config = SYSTEMS[kind].from_dict(raw)
    except Refused as refused:
        return None, [Finding(about, "wrong", reason) for reason in refused.reasons]
    except FileNotFoundError as error:
        return None, [Finding(about, "wrong", f"{error} {_where_from(directory)}".strip())]
    except OSError as error:
        return None, [Finding(about, "wrong", str(error))]
    base = config.base_model_config
    sizes = f"S {config.segment_size}, m {config.num_mem_tokens}"
    if hasattr(config, "d_mem"):
        sizes += f", d_mem {config.d_mem}, {config.variant}"
    said = (
        f"{kind} on {base.model_type}, {base.num_hidden_layers} layers of width {base.hidden_size}, {sizes}, "
        f"generation policy {config.generation_policy}, {config.model_dtype}."
    )
    return config, [Finding(about, "ok", said)]


def _no_system(directory: Path, raw: dict[str, Any]) -> str:
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in BACKBONES:
        return (
            f"It is a {kind} without a memory. `vllm-armt init {directory} DST` puts a fresh one around it, to train; "
            "vLLM itself serves it as it is."
        )
    return (
        f"`model_type` is {str(kind)[:60]!r}; those that are served are {', '.join(SYSTEMS)}. {_where_from(directory)}"
    ).strip()


def _where_from(directory: Path) -> str:
    """What to do with weights that no config.json of ours describes."""
    try:
        is_theirs = is_research(read_tensors(directory))
    except (Refused, OSError):
        return ""
    return f"Its weights are of the research code: vllm-armt convert {directory} DST." if is_theirs else ""


def _weights(directory: Path, config: RecurrentConfig | None) -> Iterator[Finding]:
    """What is wrong with the weights, judged by the configuration, or without one by themselves."""
    about = "weights"
    try:
        tensors = {name: tensor for name, tensor in _served_tensors(directory).items() if not is_old_buffer(name)}
        if config is None:
            reasons = list(unsound(tensors))
        else:
            refuse_other_base(tensors, config.base_model_config, CONFIG_NAME)
            reasons = list(faults(skeleton(config, CONFIG_NAME), tensors, CONFIG_NAME))
    except Refused as refused:
        reasons = refused.reasons
    except OSError as error:
        reasons = [str(error)]
    for reason in reasons:
        yield Finding(about, "wrong", reason)
    if not reasons:
        size = sum(tensor.nbytes for tensor in tensors.values())
        count = sum(tensor.numel() for tensor in tensors.values())
        said = f"{len(tensors)} tensors, {count / 1e6:,.2f} million numbers, all finite, {size / 1e6:,.1f} MB."
        yield Finding(about, "ok", said)


def _served_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors that vLLM loads: of one file, of an index's shards, or of every *.safetensors where none is named."""
    tensors = read_tensors(directory)
    is_sharded = (directory / "model.safetensors.index.json").exists()
    beside = [file for file in sorted(directory.glob("*.safetensors")) if file.name != "model.safetensors"]
    if beside and not is_sharded:
        named = ", ".join(file.name for file in beside if regular_file(file))
        raise Refused(
            f"Beside model.safetensors there is {named}: vLLM takes every *.safetensors of a directory for weights. "
            "Move it away."
        )
    return tensors


def _tokenizer(directory: Path) -> Finding:
    if has_tokenizer(directory):
        return Finding("tokenizer", "ok", "There is one.")
    return Finding("tokenizer", "note", "There is none: serve with --skip-tokenizer-init, and send token ids.")
