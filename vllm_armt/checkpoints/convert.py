"""Converting a checkpoint of the authors' code into a directory that transformers and vLLM open.

Every tensor of the source is accounted for: renamed, merged, listed as left out, or an error that names it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from vllm_armt.checkpoints.assemble import assemble, generation_config, save, widest
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.infer import infer_fields
from vllm_armt.checkpoints.legacy import upgrade_config
from vllm_armt.checkpoints.looks import refuse_other_base
from vllm_armt.checkpoints.lora import merge_lora
from vllm_armt.checkpoints.names import is_research, to_hf_names
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.checkpoints.wrapper_args import WrapperArgs
from vllm_armt.config import BACKBONES, RecurrentConfig, Refused
from vllm_armt.config.base_model import parsed
from vllm_armt.config.refused import translated
from vllm_armt.hf import is_memory

_WAYS = {"learned_positions": "restart", "generation_policy": "open"}
"""Of the wrapper: it runs every segment by itself, so learned positions begin anew, and generates in the last one."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        config: the configuration.
        assumed: what nobody gave and nothing shows, with the default that was taken.
        left_out: names of tensors that have no effect.
        tokenizer: where the tokenizer came from.
    """

    config: RecurrentConfig
    assumed: dict[str, Any]
    left_out: list[str]
    tokenizer: Path | None


def convert(
    src: Path,
    dst: Path,
    base_config: Path | None = None,
    args: WrapperArgs | None = None,
    *,
    tokenizer: Path | None = None,
    **options: Any,
) -> Conversion:
    """Convert the checkpoint `src` into the new directory `dst`.

    A checkpoint of the research wrapper (ARMT, PRMT or RMT, which its tensors tell apart) carries neither
    configuration nor constructor arguments. One of the second-generation code with a sliding window has a
    config.json beside it, which says all.

    Args:
        src: see `read_tensors`.
        dst: absent or empty.
        base_config: directory of the base model, or its config.json; needed for a checkpoint of the wrapper.
        args: what the wrapper was constructed with.
        tokenizer: directory to copy the tokenizer from; by default beside `src`, else `base_config`.
        options: further fields of the system's configuration. `generation_policy` is "open" unless given:
            the papers' released code never closes the prompt's last segment.

    Raises:
        Refused: the checkpoint is none that is supported, or not in every part what the arguments and
            the base model's config make it; the message names the part.
        OSError: a file is missing, or `dst` is taken. In no case is anything left behind.
    """
    args = args or WrapperArgs()
    assumed: dict[str, Any] = {}
    left_out: list[str] = []
    directory = config_directory = _directory(src)
    with new_directory(dst) as staging:
        tensors = read_tensors(src)
        if is_research(tensors):
            base, config_directory = _base(base_config)
            refuse_other_base(tensors, base, f"{base_config}")
            tensors, left_out = to_hf_names(tensors, BACKBONES[base.model_type].layers)
            tensors = merge_lora(tensors, args.lora_alpha, in_out=_has_conv1d(base))
            fields, assumed = args.complete(infer_fields(tensors, base))
            config = _config(base, fields | _dtypes(tensors), options)
            assumed |= _assumed_ways(config, args.given.keys() | options.keys())
        else:
            config = upgrade_config(directory, _dtypes(tensors) | options)
            refuse_other_base(tensors, config.base_model_config, f"{directory / 'config.json'}")
            if base_config or args != WrapperArgs():
                raise Refused(
                    f"{directory / 'config.json'} says what the model is: leave base model and arguments out."
                )
        model = assemble(config, tensors, f"the base model's config and the system {config.model_type!r}")
        if found := generation_config(config_directory):
            model.generation_config = found
        save(model, staging)
        copied = copy_tokenizer([tokenizer] if tokenizer else [directory, config_directory], staging)
        if tokenizer and not copied:
            raise FileNotFoundError(f"{tokenizer} has no tokenizer files.")
    return Conversion(config, assumed, left_out, copied)


def _base(path: Path | None) -> tuple[PretrainedConfig, Path]:
    """The base model's configuration, and the directory that it is in."""
    if path is None:
        raise Refused(
            "The checkpoint does not say what its base model is. Give that model's directory or config.json: "
            "--base-config PATH."
        )
    file = path / CONFIG_NAME if path.is_dir() else path
    if not file.exists():  # transformers would look for such a name on the hub
        raise FileNotFoundError(
            f"--base-config: {file} does not exist. Give the base model's directory or config.json; of a model on the "
            "Hugging Face hub fetch it first: hf download NAME config.json --local-dir DIR."
        )
    return parsed(read_json(file), f"{file}"), file.parent


def _has_conv1d(base: PretrainedConfig) -> bool:
    with translated("transformers makes no model by the base model's config"), torch.device("meta"):
        return any(isinstance(module, Conv1D) for module in AutoModelForCausalLM.from_config(base).modules())


def _config(base: PretrainedConfig, fields: dict[str, Any], options: dict[str, Any]) -> RecurrentConfig:
    system = fields.pop("system")
    refuse_foreign_options(system, options)
    return SYSTEMS[system](base_model_config=base, **(fields | _WAYS | options))


def _assumed_ways(config: RecurrentConfig, given: Container[str]) -> dict[str, Any]:
    """What the authors' code does, of what it could do with this model and nobody has said."""
    matters = {
        "aliased": config.model_type == "prmt",
        "sliding_window": bool(config.wrap_pos) and config.model_type != "prmt",
        "learned_positions": config.backbone.positions is not None and not config.wrap_pos,
        "generation_policy": True,
    }
    return {name: getattr(config, name) for name, does in matters.items() if does and name not in given}


def _dtypes(tensors: dict[str, Tensor]) -> dict[str, torch.dtype | None]:
    memory = {name: tensor for name, tensor in tensors.items() if is_memory(name)}
    return {
        "model_dtype": widest(tensor for name, tensor in tensors.items() if name not in memory),
        "memory_dtype": widest(memory.values()),
    }


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent
