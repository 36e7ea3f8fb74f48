"""Converting a checkpoint of the authors' code into a directory that transformers and vLLM open.

Every tensor of the source is accounted for: renamed, merged, listed as left out, or an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from vllm_armt.checkpoints.beside import Beside
from vllm_armt.checkpoints.directory import copy_tokenizer, new_directory
from vllm_armt.checkpoints.hub import BESIDE, directory_of, weights_of
from vllm_armt.checkpoints.infer import infer_fields
from vllm_armt.checkpoints.legacy import upgrade_config
from vllm_armt.checkpoints.lora import merge_lora
from vllm_armt.checkpoints.names import is_research, to_hf_names
from vllm_armt.checkpoints.read import read_tensors
from vllm_armt.checkpoints.systems import SYSTEMS, refuse_foreign_options
from vllm_armt.checkpoints.wrapper_args import WrapperArgs
from vllm_armt.config import BACKBONES, ARMTConfig, RecurrentConfig, supported_backbones
from vllm_armt.config.base_model import base_model_config
from vllm_armt.config.versions import Confirmable
from vllm_armt.hf import is_memory

MAX_SHARD_SIZE = "5GB"


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
        ValueError: the checkpoint is none that is supported, or not in every part what the arguments and
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
            base, base_directory = _base_of_wrapper(base_config, beside)
            tensors, left_out = to_hf_names(tensors, BACKBONES[base.model_type].layers)
            args = _with_arguments_beside(args, beside)
            tensors = merge_lora(tensors, args.lora_alpha, in_out=_has_conv1d(base))
            fields, assumed = args.complete(infer_fields(tensors, base), beside.guesses)
            config = _config(base, fields | _dtypes(tensors), options)
        else:
            named = None if beside.config.get("base_model_config") else beside.config.get("base_model_name")
            base_directory, given = beside.directory, None
            if base_config or (named and beside.version not in (None, "today")):
                given, base_directory = _base(base_config or named)
            config = upgrade_config(beside, given, _dtypes(tensors) | options)
            if args != WrapperArgs():
                raise ValueError(f"{beside.file} says what the model is: leave the wrapper's arguments out.")
        model = _model(config, tensors)
        sources = [beside.directory, base_directory]
        for directory in sources:
            if (directory / GENERATION_CONFIG_NAME).exists():
                model.generation_config = GenerationConfig.from_pretrained(directory)
                break
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        copied = copy_tokenizer([tokenizer] if tokenizer else sources, staging)
        if tokenizer and not copied:
            raise FileNotFoundError(f"{tokenizer} has no tokenizer files.")
    return Conversion(config, assumed, left_out, copied)


def _base_of_wrapper(given: Path | str | None, beside: Beside) -> tuple[PretrainedConfig, Path]:
    """The base model's configuration, and where its other files are, of a checkpoint of the research wrapper."""
    if beside.version not in (None, "outer_loop") or beside.system not in (None, ARMTConfig.model_type):
        raise ValueError(
            f"{beside.file} is of a {beside.system} ({beside.version or 'of ours'}), whose tensors have other names "
            "than these (memory_cell.*): one of the two is another model's."
        )
    nested, named = (beside.config.get(f"base_model_{part}") for part in ("config", "name"))
    if given is None and nested is not None:
        return base_model_config(nested, None), beside.directory
    if given is None and beside.config.get("model_type") in BACKBONES:
        return _base(beside.file)
    if given is None and named is None:
        raise ValueError(
            "The checkpoint does not say what its base model is. Give that model's directory or config.json, or its "
            "name on the Hugging Face hub: --base-config PATH or OWNER/NAME."
        )
    return _base(given or named)


def _with_arguments_beside(args: WrapperArgs, beside: Beside) -> WrapperArgs:
    """With those of a config.json that holds the wrapper's, unless a file of them was given."""
    is_of_wrapper = beside.version == "outer_loop" or "model_type" not in beside.config
    return args.over(beside.file) if beside.config and is_of_wrapper and args.path is None else args


def _base(name: Path | str) -> tuple[PretrainedConfig, Path]:
    """The base model's configuration, and the directory that it is in."""
    path = Path(name)
    if not path.exists() and path.name != CONFIG_NAME:
        path = directory_of(name, BESIDE, "--base-config, the base model")
    file = path / CONFIG_NAME if path.is_dir() else path
    if not file.is_file():  # transformers would look for such a name on the hub
        raise FileNotFoundError(
            f"--base-config: {file} does not exist. Give the base model's directory or config.json."
        )
    config = AutoConfig.from_pretrained(file)
    if config.model_type not in BACKBONES:
        raise ValueError(
            f"{path}: the base model is of type {config.model_type!r}, which is not supported. "
            f"Supported: {supported_backbones()}."
        )
    config.name_or_path = ""  # would put a path of this machine into the new config.json
    return config, file.parent


def _has_conv1d(base: PretrainedConfig) -> bool:
    with torch.device("meta"):
        return any(isinstance(module, Conv1D) for module in AutoModelForCausalLM.from_config(base).modules())


def _config(base: PretrainedConfig, fields: dict[str, Any], options: dict[str, Any]) -> RecurrentConfig:
    system = fields.pop("system")
    refuse_foreign_options(system, options)
    # the wrapper runs every segment by itself, so learned positions begin anew, and generates in the last one
    ways = {"learned_positions": "restart", "generation_policy": "open"}
    return SYSTEMS[system](base_model_config=base, **(fields | ways | options))


def _dtypes(tensors: dict[str, Tensor]) -> dict[str, torch.dtype | None]:
    memory = {name: tensor for name, tensor in tensors.items() if is_memory(name)}
    return {
        "model_dtype": _widest(tensor for name, tensor in tensors.items() if name not in memory),
        "memory_dtype": _widest(memory.values()),
    }


def _model(config: RecurrentConfig, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The model with these weights; they must be exactly its parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # some parameters have another name on disk than in transformers' model, for instance GPT-NeoX's head
    renamings = get_model_conversion_mapping(model, add_legacy=False)
    tensors = {rename_source_key(name, renamings, [])[0]: tensor for name, tensor in tensors.items()}
    for head, embeddings in model.all_tied_weights_keys.items():
        tensors |= _tied(tensors, head, embeddings)
    expected = model.state_dict()
    for problem, names in (
        ("Missing", expected.keys() - tensors.keys()),
        ("Unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{problem} tensor {_and_more(names)}, judged by the base model's config and the system "
                f"{config.model_type!r}."
            )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"Tensor {name!r} has shape {list(tensor.shape)}; by the base model's config and the memory's sizes it "
                f"must be {list(expected[name].shape)}."
            )
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in tensors.items()}, assign=True)
    model.tie_weights()
    return model


def _tied(tensors: dict[str, Tensor], head: str, embeddings: str) -> dict[str, Tensor]:
    present = [tensors[name] for name in (head, embeddings) if name in tensors]
    if len(present) == 2 and not torch.equal(*present):
        raise ValueError(
            f"The base model's config ties {head!r} to {embeddings!r}, but the checkpoint has two different tensors. "
            "Set `tie_word_embeddings` to false in that config if the model was trained so."
        )
    return {name: tensor for tensor in present[:1] for name in (head, embeddings)}


def _widest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype that holds all of them without loss; some training scripts mix them. None of none."""
    dtypes = {tensor.dtype for tensor in tensors}
    return reduce(torch.promote_types, dtypes) if dtypes else None


def _and_more(names: set[str]) -> str:
    first, *rest = sorted(names)
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")
