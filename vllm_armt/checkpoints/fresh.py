"""A fresh ARMT around a base model: the start of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

from vllm_armt.checkpoints.convert import MAX_SHARD_SIZE
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.config import ARMTConfig
from vllm_armt.hf import ARMTForCausalLM

_BASE_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]


def init_from_base(
    base: str,
    dst: Path,
    *,
    segment_size: int,
    num_mem_tokens: int,
    d_mem: int,
    seed: int = 0,
    **options: Any,
) -> ARMTConfig:
    """Write a fresh ARMT around `base` into the new directory `dst`, with base's tokenizer and dtype.

    Until it is trained it computes what the base model does within a segment, and forgets the rest.

    Args:
        base: a directory, or the name of a model on the Hugging Face hub.
        dst: absent or empty.
        segment_size: S. num_mem_tokens: m. d_mem: p.
        seed: for the memory tokens and the memory projections.
        options: further fields of `ARMTConfig`.

    Raises:
        ValueError: the base model is not supported, or a size is out of range.
        OSError: the base model cannot be found, or `dst` is taken.
    """
    source = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, allow_patterns=_BASE_FILES))
    with new_directory(dst) as staging:
        torch.manual_seed(seed)
        model = ARMTForCausalLM.from_base(
            AutoModelForCausalLM.from_pretrained(source, dtype="auto"), segment_size, num_mem_tokens, d_mem, **options
        )
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        copy_tokenizer([source], staging)
    return model.config
