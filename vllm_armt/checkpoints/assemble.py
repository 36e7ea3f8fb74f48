"""A transformers model of exactly the tensors of a checkpoint, each of which is sound."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from functools import reduce
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.utils import GENERATION_CONFIG_NAME

from vllm_armt.checkpoints.files import read_json
from vllm_armt.config.base import DTYPES
from vllm_armt.config.refused import Refused, translated

MAX_SHARD_SIZE = "5GB"
FEW = 5
"""Faulty tensors that are named."""


def assemble(config: PretrainedConfig, tensors: dict[str, Tensor], judges: str) -> PreTrainedModel:
    """The model with these weights; they must be exactly its parameters, tied ones by either name or both.

    Args:
        config: of a causal language model, of sizes that were compared with the tensors'.
        tensors: by the names of files of such a model.
        judges: what says which tensors there must be, for messages.

    Raises:
        Refused: a tensor is missing, unexpected or ill-shaped, tied ones differ, or one holds no finite numbers.
    """
    model = skeleton(config, judges)
    if reasons := list(faults(model, tensors, judges)):
        raise Refused(*reasons)
    expected, named = model.state_dict(), _tied(model, _renamed(model, tensors))
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in named.items()}, assign=True)
    model.tie_weights()
    return model


def skeleton(config: PretrainedConfig, judges: str) -> PreTrainedModel:
    """The model without weights.

    Raises:
        Refused: transformers can't make it.
    """
    with translated(f"transformers makes no model by {judges}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def faults(model: PreTrainedModel, tensors: dict[str, Tensor], judges: str) -> Iterator[str]:
    """Sentences on what keeps tensors from being the model's weights; of ill-shaped and unsound ones, a few.

    Args:
        model: as `skeleton` makes it.
        tensors: by the names of files.
        judges: as in `assemble`.
    """
    renamed = _renamed(model, tensors)
    yield from _untied(model, renamed)
    named, expected = _tied(model, renamed), model.state_dict()
    for problem, names in (("Missing", expected.keys() - named.keys()), ("Unexpected", named.keys() - expected.keys())):
        if names:
            yield f"{problem} tensor {_and_more(names)}, judged by {judges}."
    known = {name: named[name] for name in sorted(named.keys() & expected.keys())}
    yield from islice(
        (reason for name in known if (reason := _wrong_shape(name, known[name], expected[name], judges))), FEW
    )
    yield from unsound(known)


def unsound(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Sentences on tensors that are no weights whatever the model: of a foreign dtype, or not finite; on a few."""
    return islice((reason for name, tensor in tensors.items() if (reason := _why_unsound(name, tensor))), FEW)


def widest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype that holds all of them without loss; some training scripts mix them. None of none.

    Raises:
        Refused: one is of a dtype that weights do not have.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if others := sorted(str(dtype) for dtype in dtypes if str(dtype).removeprefix("torch.") not in DTYPES):
        raise Refused(f"The checkpoint has tensors of {', '.join(others)}; weights are {', '.join(DTYPES)}.")
    return reduce(torch.promote_types, dtypes) if dtypes else None


def generation_config(directory: Path) -> GenerationConfig | None:
    """The generation_config.json of a directory; None if it has none.

    Raises:
        Refused: transformers can't read it.
    """
    file = directory / GENERATION_CONFIG_NAME
    if not file.exists():
        return None
    raw = read_json(file)
    with translated(f"transformers can't read {file}"):
        return GenerationConfig.from_dict(raw)


def save(model: PreTrainedModel, directory: Path) -> None:
    """Save a model in shards.

    Raises:
        OSError: it can't be written.
        Refused: transformers doesn't write what belongs to it, for instance generation parameters that contradict.
    """
    with translated("transformers can't save the model"):
        model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)


def _prefixed(name: str, prefix: str, expected: Container[str]) -> str:
    """A parameter's name in a model with a head, of a file that may be of one without."""
    return prefix + name if name not in expected and prefix + name in expected else name


def _renamed(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of the model's parameters."""
    # some parameters have another name on disk than in transformers' model, for instance GPT-NeoX's head
    renamings = get_model_conversion_mapping(model, add_legacy=False)
    expected, prefix = model.state_dict(), f"{model.base_model_prefix}."
    return {
        _prefixed(rename_source_key(name, renamings, [])[0], prefix, expected): tensor
        for name, tensor in tensors.items()
    }


def _tied(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, tied ones by all of their names."""
    tied = dict(tensors)
    for names in model.all_tied_weights_keys.items():
        present = [tensors[name] for name in names if name in tensors]
        tied |= {name: present[0] for name in names if present}
    return tied


def _untied(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Iterator[str]:
    """A sentence for each pair of tied parameters whose tensors differ."""
    for head, embeddings in model.all_tied_weights_keys.items():
        if head in tensors and embeddings in tensors and not torch.equal(tensors[head], tensors[embeddings]):
            yield (
                f"The base model's config ties {head!r} to {embeddings!r}, but the checkpoint has two different "
                "tensors. Set `tie_word_embeddings` to false in that config if the model was trained so."
            )


def _wrong_shape(name: str, tensor: Tensor, expected: Tensor, judges: str) -> str | None:
    if tensor.shape == expected.shape:
        return None
    return f"Tensor {name!r} has shape {list(tensor.shape)}; by {judges} it must be {list(expected.shape)}."


def _why_unsound(name: str, tensor: Tensor) -> str | None:
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        return f"Tensor {name!r} is of {tensor.dtype}; weights are {', '.join(DTYPES)}."
    # NaN wins in both, so that one pass without a copy tells all
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        return (
            f"Tensor {name!r} holds NaN or infinity: the training went astray, or the file is damaged. Take an earlier "
            "checkpoint."
        )
    return None


def _and_more(names: set[str]) -> str:
    first, *rest = sorted(names)
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")
