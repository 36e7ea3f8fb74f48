"""A fresh model of any system around a base model: the start of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_armt.checkpoints.convert import MAX_SHARD_SIZE
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.hub import directory_of
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.config import RecurrentConfig
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
        ValueError: the base model is not supported, the system has no such option, or one is out of range.
        OSError: the base model cannot be found, or `dst` is taken.
    """
    refuse_foreign_options(system, options)
    for name in SYSTEMS[system].required.keys() - {"segment_size", "num_mem_tokens"} - options.keys():
        raise ValueError(f"System {system!r} needs `{name}`, {SYSTEMS[system].required[name]}: give it.")
    options.setdefault("learned_positions", "restart")
    source = directory_of(base, _BASE_FILES, "the base model")
    with new_directory(dst) as staging:
        torch.manual_seed(seed)
        model = MODELS[system].from_base(
            AutoModelForCausalLM.from_pretrained(source, dtype="auto"), segment_size, num_mem_tokens, **options
        )
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        copy_tokenizer([source], staging)
    return model.config
