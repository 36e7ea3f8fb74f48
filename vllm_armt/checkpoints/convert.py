"""Converting a research checkpoint of the authors' into a directory that transformers and vLLM open.

Every tensor of the source is accounted for: renamed, merged, or an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.lora import merge_lora
from vllm_armt.checkpoints.names import to_hf_names
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.wrapper_args import WrapperArgs
from vllm_armt.config import LAYERS_ATTR, ARMTConfig
from vllm_armt.hf import ARMTForCausalLM

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Conversion:
    """What a conversion made: the configuration, what was assumed, and where the tokenizer came from."""

    config: ARMTConfig
    assumed: dict[str, Any]
    tokenizer: Path | None


def convert(
    src: Path,
    dst: Path,
    base_config: Path,
    args: WrapperArgs,
    *,
    tokenizer: Path | None = None,
    **options: Any,
) -> Conversion:
    """Convert the research checkpoint `src` into the new directory `dst`.

    Args:
        src: see `read_tensors`.
        dst: absent or empty.
        base_config: directory of the base model, or its config.json.
        args: what the wrapper was constructed with.
        tokenizer: directory to copy the tokenizer from; by default beside `src`, else `base_config`.
        options: further fields of `ARMTConfig`. `generation_policy` is "open" unless given: the papers'
            released code never closes the prompt's last segment.

    Raises:
        ValueError: the checkpoint is not an ARMT that is supported, or not in every part what the
            arguments and the base model's config make it; the message names the part.
        OSError: a file is missing, or `dst` is taken. In no case is anything left behind.
    """
    _refuse_hf_style(src)
    base = _base_config(base_config)
    with new_directory(dst) as staging:
        tensors = merge_lora(to_hf_names(read_tensors(src), LAYERS_ATTR[base.model_type]), args.lora_alpha)
        config = _config(tensors, base, args, {"generation_policy": "open"} | options)
        model = _model(config, tensors)
        base_dir = base_config if base_config.is_dir() else base_config.parent
        if (base_dir / GENERATION_CONFIG_NAME).exists():
            model.generation_config = GenerationConfig.from_pretrained(base_dir)
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        beside = src if src.is_dir() else src.parent
        copied = copy_tokenizer([tokenizer] if tokenizer else [beside, base_dir], staging)
        if tokenizer and not copied:
            raise FileNotFoundError(f"{tokenizer} has no tokenizer files.")
    return Conversion(config, args.assumed, copied)


def _refuse_hf_style(src: Path) -> None:
    config = (src if src.is_dir() else src.parent) / "config.json"
    if config.exists() and json.loads(config.read_text()).get("model_type") == ARMTConfig.model_type:
        raise ValueError(
            f"{src} is already in the authors' HF layout, which is served as it is: vllm serve {config.parent}"
        )


def _base_config(path: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in LAYERS_ATTR:
        raise ValueError(
            f"{path}: the base model is of type {config.model_type!r}, which is not supported. "
            f"Supported: {', '.join(sorted(LAYERS_ATTR))}."
        )
    config.name_or_path = ""  # would put a path of this machine into the new config.json
    return config


def _config(
    tensors: dict[str, Tensor], base: PretrainedConfig, args: WrapperArgs, options: dict[str, Any]
) -> ARMTConfig:
    first_layer = f"model.{LAYERS_ATTR[base.model_type]}.0"
    m, _ = _matrix(tensors, "memory")
    p, _ = _matrix(tensors, f"{first_layer}.W_mq.weight")
    for name, given, found in (("num_mem_tokens", args.num_mem_tokens, m), ("d_mem", args.d_mem, p)):
        if given is not None and given != found:
            raise ValueError(f"`{name}` was given as {given}, but the checkpoint's tensors say {found}.")
    beta_rows, _ = _matrix(tensors, f"{first_layer}.W_mb.weight")
    if beta_rows != 1:
        raise ValueError(
            f"'{first_layer}.W_mb.weight' has {beta_rows} rows: the memory has several heads or gating. Only "
            "n_heads=1 without gating is supported."
        )
    return ARMTConfig(
        base_model_config=base,
        segment_size=args.segment_size,
        num_mem_tokens=m,
        d_mem=p,
        variant=args.variant,
        correction=args.correction,
        use_denom=args.use_denom,
        model_dtype=_widest(t for name, t in tensors.items() if not _is_memory(name)),
        memory_dtype=_widest(t for name, t in tensors.items() if _is_memory(name)),
        **args.others,
        **options,
    )


def _model(config: ARMTConfig, tensors: dict[str, Tensor]) -> ARMTForCausalLM:
    """The model with these weights; they must be exactly its parameters."""
    tensors = _complete_tied_head(tensors) if config.tie_word_embeddings else tensors
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = model.state_dict()
    for problem, names in (
        ("Missing", expected.keys() - tensors.keys()),
        ("Unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{problem} tensor {_and_more(names)}, judged by the base model's config.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"Tensor {name!r} has shape {list(tensor.shape)}; by the base model's config and the memory's sizes it "
                f"must be {list(expected[name].shape)}."
            )
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in tensors.items()}, assign=True)
    model.tie_weights()
    return model


def _complete_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    head, embeddings = "model.lm_head.weight", "model.model.embed_tokens.weight"
    present = [tensors[name] for name in (head, embeddings) if name in tensors]
    if len(present) == 2 and not torch.equal(*present):
        raise ValueError(
            f"The base model's config ties {head!r} to {embeddings!r}, but the checkpoint has two different tensors. "
            "Set `tie_word_embeddings` to false in that config if the model was trained so."
        )
    return tensors | {name: tensor for tensor in present[:1] for name in (head, embeddings)}


def _matrix(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise ValueError(f"Missing tensor {name!r}: the checkpoint has no such part of the memory.")
    if tensors[name].ndim != 2:
        raise ValueError(f"Tensor {name!r} has shape {list(tensors[name].shape)}; it must have two dimensions.")
    rows, columns = tensors[name].shape
    return rows, columns


def _is_memory(name: str) -> bool:
    return name == "memory" or ".W_m" in name


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all of them without loss; some training scripts mix them."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _and_more(names: set[str]) -> str:
    first, *rest = sorted(names)
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")
