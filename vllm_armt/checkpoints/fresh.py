"""A fresh model of any system around a base model: the start of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from vllm_armt.checkpoints.assemble import assemble, generation_config, save, widest
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.hub import directory_of
from vllm_armt.checkpoints.looks import refuse_other_base
from vllm_armt.checkpoints.names import is_old_buffer
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.checkpoints.text_part import text_part
from vllm_armt.config import RecurrentConfig, Refused
from vllm_armt.config.base_model import parsed
from vllm_armt.hf import MODELS

_BASE_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]


def init_from_base(
    base: str,
    dst: Path,
    *,
    system: str = "armt",
    segment_size: int,
    num_mem_tokens: int,
    seed: int = 0,
    **options: Any,
) -> RecurrentConfig:
    """Write a fresh model around `base` into the new directory `dst`, with base's tokenizer and dtype.

    Until it is trained, an ARMT computes what the base model does within a segment, and forgets the rest. What
    stands before a segment's tokens (the memory of an RMT or a PRMT, a sink) disturbs the base model until then.

    Args:
        base: a directory, or the name of a model on the Hugging Face hub.
        dst: absent or empty.
        system: "armt", "armt_sw", "prmt" or "rmt".
        segment_size: S. num_mem_tokens: m.
        seed: for everything that is drawn.
        options: further fields of the system's configuration, for an ARMT `d_mem` at least. Learned
            positions "restart" in every segment unless given: growing ones end the text where they do.

    Raises:
        Refused: the base model is not supported or not whole, the system has no such option, or one is out of range.
        OSError: the base model cannot be found, or `dst` is taken.
    """
    refuse_foreign_options(system, options)
    for name in SYSTEMS[system].required.keys() - {"segment_size", "num_mem_tokens"} - options.keys():
        raise Refused(f"System {system!r} needs `{name}`, {SYSTEMS[system].required[name]}: give it.")
    options.setdefault("learned_positions", "restart")
    source = directory_of(base, _BASE_FILES, "the base model")
    with new_directory(dst) as staging:
        torch.manual_seed(seed)
        model = MODELS[system].from_base(_base_model(source), segment_size, num_mem_tokens, **options)
        save(model, staging)
        copy_tokenizer([source], staging)
    return model.config


def _base_model(source: Path) -> PreTrainedModel:
    """The base model of a directory, in the dtype that its config.json says, or else its weights have.

    Raises:
        OSError: a file is missing.
        Refused: it is not supported, or its files aren't exactly the model that its config.json says.
    """
    file = source / CONFIG_NAME
    raw, tensors = text_part(read_json(file), read_tensors(source))
    config = parsed(raw, f"{file}")
    tensors = {name: tensor for name, tensor in tensors.items() if not is_old_buffer(name)}
    refuse_other_base(tensors, config, f"{file}")
    config.dtype = config.dtype or widest(tensors.values())
    model = assemble(config, tensors, f"{file}")
    if found := generation_config(source):
        model.generation_config = found
    return model
