"""Names on the Hugging Face hub: what a command is given may be a path or such a name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from vllm_armt.checkpoints.directory import TOKENIZER_FILES
from vllm_armt.checkpoints.read import WEIGHT_FILES

BESIDE = [CONFIG_NAME, GENERATION_CONFIG_NAME, "*.py", *TOKENIZER_FILES]
"""What is fetched of a repository beside its weights."""

_WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
"""Weights as `read_tensors` finds them, in order of preference: what other files a repository has stays there."""

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def directory_of(name: str | Path, patterns: Sequence[str], what: str) -> Path:
    """A directory as it is, or what these patterns name of a repository, fetched.

    Args:
        name: a path, or OWNER/NAME.
        patterns: as of `snapshot_download`.
        what: it is, for messages.

    Raises:
        FileNotFoundError: it is neither, or can't be fetched; the message says why.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except HFValidationError as error:  # no name on the hub looks like this
        raise FileNotFoundError(
            f"The directory {name} does not exist. Give {what}: a path, or OWNER/NAME of the Hugging Face hub."
        ) from error
    except OSError as error:
        raise FileNotFoundError(_cannot_fetch(name, what, error)) from error


def weights_of(name: str | Path) -> Path:
    """A path as it is, or where the weights of a repository lie once they are fetched, with what stands beside them.

    Args:
        name: a path; OWNER/NAME, whose weights have their usual names; or OWNER/NAME/FILE.

    Raises:
        FileNotFoundError: it is none of these, or can't be fetched; the message says why.
    """
    if Path(name).exists():
        return Path(name)
    what = "a checkpoint"
    owner, _, rest = str(name).partition("/")
    repository, _, file = rest.partition("/")
    if not owner.strip(".~") or not repository or (file and not file.endswith(_SUFFIXES)):
        raise FileNotFoundError(f"{name} does not exist. Give {what}: a path, or OWNER/NAME of the Hugging Face hub.")
    repository = f"{owner}/{repository}"
    directory = directory_of(repository, BESIDE, what)
    if file:
        try:
            return Path(hf_hub_download(repository, file))
        except OSError as error:
            raise FileNotFoundError(_cannot_fetch(name, what, error)) from error
    for patterns in _WEIGHTS:
        directory = directory_of(repository, [*BESIDE, *patterns], what)
        if any((directory / name).exists() for name in WEIGHT_FILES):
            return directory
    raise FileNotFoundError(
        f"{repository} has none of {', '.join(WEIGHT_FILES)}{_others(repository)}. Name one: {repository}/FILE."
    )


def _others(repository: str) -> str:
    """The weights that a repository has under other names, for a message."""
    try:
        files = HfApi().list_repo_files(repository)
    except OSError:
        return ""
    others = ", ".join(file for file in files if file.endswith(_SUFFIXES))
    return f", but {others}" if others else ""


def _cannot_fetch(name: str | Path, what: str, error: OSError) -> str:
    reason = " ".join(str(error).split())[:400]
    return (
        f"There is no {name} here, and {what} of that name can't be fetched from the Hugging Face hub ({reason}). "
        "Give a path, or check the name, the network and, where the repository asks for it, your access: hf auth login."
    )
