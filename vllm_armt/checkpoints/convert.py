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
from vllm_armt.checkpoints.beside import Beside
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.files import read_json
from vllm_armt.checkpoints.hub import BESIDE, directory_of, weights_of
from vllm_armt.checkpoints.infer import infer_fields
from vllm_armt.checkpoints.legacy import upgrade_config
from vllm_armt.checkpoints.looks import refuse_other_base
from vllm_armt.checkpoints.lora import merge_lora
from vllm_armt.checkpoints.names import is_research, to_hf_names
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.systems import SYSTEMS, has_option, refuse_foreign_options
from vllm_armt.checkpoints.wrapper_args import WrapperArgs
from vllm_armt.config import BACKBONES, ARMTConfig, RecurrentConfig, Refused
from vllm_armt.config.base_model import base_model_config, parsed
from vllm_armt.config.refused import translated
from vllm_armt.config.versions import Confirmable
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
    src: Path | str,
    dst: Path,
    base_config: Path | str | None = None,
    args: WrapperArgs | None = None,
    *,
    tokenizer: Path | None = None,
    code_version: Confirmable | None = None,
    **options: Any,
) -> Conversion:
    """Convert the checkpoint `src` into the new directory `dst`.

    What stands beside the weights is used: a config.json of an ARMT, of the base model, or of the wrapper's arguments;
    the tokenizer; and the names in a Python file, which is never run. A checkpoint of the research wrapper (ARMT, PRMT
    or RMT, which its tensors tell apart) may have none of these. One whose tensors have today's names has a config.json
    of an older version, which is rewritten.

    Args:
        src: see `read_tensors`; or OWNER/NAME of the Hugging Face hub, or OWNER/NAME/FILE.
        dst: absent or empty.
        base_config: directory of the base model, its config.json, or its name on the hub; needed where nothing
            beside `src` says what it is.
        args: what the wrapper was constructed with; they win over what stands beside `src`.
        tokenizer: directory to copy the tokenizer from; by default beside `src`, else `base_config`.
        code_version: which version of the authors' code it is, where the files leave that open.
        options: further fields of the system's configuration. `generation_policy` of the wrapper's checkpoints is
            "open" unless given: its code never closes the prompt's last segment.

    Raises:
        Refused: the checkpoint is none that is supported, or not in every part what the arguments and
            the base model's config make it; the message names the part.
        OSError: a file is missing, or `dst` is taken. In no case is anything left behind.
    """
    args = args or WrapperArgs()
    assumed: dict[str, Any] = {}
    left_out: list[str] = []
    with new_directory(dst) as staging:
        weights = weights_of(src)
        beside = Beside.of(weights if weights.is_dir() else weights.parent, str(src), code_version)
        tensors = read_tensors(weights)
        if is_research(tensors):
            base, base_directory, said_by = _base_of_wrapper(base_config, beside)
            refuse_other_base(tensors, base, said_by)
            tensors, left_out = to_hf_names(tensors, BACKBONES[base.model_type].layers)
            args = _with_arguments_beside(args, beside)
            tensors = merge_lora(tensors, args.lora_alpha, in_out=_has_conv1d(base))
            fields, assumed = args.complete(infer_fields(tensors, base), beside.guesses)
            if has_option(fields["system"], "sliding_window"):
                beside.refuse_unsaid_window(args.given)
            config = _config(base, fields | _dtypes(tensors), options)
            assumed |= _assumed_ways(config, args.given.keys() | options.keys())
        else:
            base_directory, given = beside.directory, None
            name = base_config or _base_name(beside)
            if name is not None:
                given, base_directory, _ = _base(name)
            config = upgrade_config(beside, given, _dtypes(tensors) | options)
            refuse_other_base(tensors, config.base_model_config, f"{beside.file}" if name is None else f"{name}")
            if args != WrapperArgs():
                raise Refused(f"{beside.file} says what the model is: leave the wrapper's arguments out.")
        model = assemble(config, tensors, f"the base model's config and the system {config.model_type!r}")
        sources = [beside.directory, base_directory]
        if found := next(filter(None, map(generation_config, sources)), None):
            model.generation_config = found
        save(model, staging)
        copied = copy_tokenizer([tokenizer] if tokenizer else sources, staging)
        if tokenizer and not copied:
            raise FileNotFoundError(f"{tokenizer} has no tokenizer files.")
    return Conversion(config, assumed, left_out, copied)


def _base_of_wrapper(given: Path | str | None, beside: Beside) -> tuple[PretrainedConfig, Path, str]:
    """The base model's configuration, where its other files are, and what says it, for the research wrapper."""
    if beside.version not in (None, "outer_loop") or beside.system not in (None, ARMTConfig.model_type):
        raise Refused(
            f"{beside.file} is of a {beside.system} ({beside.version or 'of ours'}), whose tensors have other names "
            "than these (memory_cell.*): one of the two is another model's."
        )
    nested = beside.config.get("base_model_config")
    if given is None and nested is not None:
        return base_model_config(nested, None), beside.directory, f"{beside.file}"
    is_the_bases = beside.system is None and beside.config.get("model_type") in BACKBONES
    name = given or (beside.file if is_the_bases else _base_name(beside))
    if name is None:
        raise Refused(
            "The checkpoint does not say what its base model is. Give that model's directory or config.json, or its "
            "name on the Hugging Face hub: --base-config PATH or OWNER/NAME."
        )
    return _base(name)


def _base_name(beside: Beside) -> str | None:
    """What an older version's config.json calls the base model, where it holds no more of it."""
    name = beside.config.get("base_model_name")
    is_asked = beside.version not in (None, "today") and beside.config.get("base_model_config") is None
    return name if is_asked and isinstance(name, str) else None


def _with_arguments_beside(args: WrapperArgs, beside: Beside) -> WrapperArgs:
    """With those of a config.json that holds the wrapper's, unless a file of them was given."""
    is_of_wrapper = beside.version == "outer_loop" or "model_type" not in beside.config
    return args.over(beside.file) if beside.config and is_of_wrapper and args.path is None else args


def _base(name: Path | str) -> tuple[PretrainedConfig, Path, str]:
    """The base model's configuration, the directory that it is in, and what it is called."""
    path = Path(name)
    if not path.exists() and path.name != CONFIG_NAME:
        path = directory_of(name, BESIDE, "the base model (--base-config)")
    file = path / CONFIG_NAME if path.is_dir() else path
    if not file.exists():  # transformers would look for such a name on the hub
        raise FileNotFoundError(
            f"--base-config: {file} does not exist. Give the base model's directory or config.json."
        )
    return parsed(read_json(file), f"{file}"), file.parent, f"{name}"


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
