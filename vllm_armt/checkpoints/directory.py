"""Writing a checkpoint's directory: complete or not at all, with its tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_armt.checkpoints.files import inside

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
)


@contextmanager
def new_directory(dst: Path) -> Iterator[Path]:
    """A temporary directory beside `dst` that takes its place when the block ends without an error.

    Raises:
        FileExistsError: `dst` exists and is not an empty directory.
    """
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"{dst} already exists and is not empty; nothing was written. Choose another DST.")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as temporary:
        # mkdtemp's directory is private to its owner, which the result should not be
        staging = Path(temporary) / dst.name
        staging.mkdir()
        yield staging
        staging.rename(dst)


def has_tokenizer(directory: Path) -> bool:
    """Whether files of a tokenizer are there."""
    return any(True for pattern in TOKENIZER_FILES for _ in directory.glob(pattern))


def copy_tokenizer(sources: list[Path], dst: Path) -> Path | None:
    """Copy the tokenizer's files from the first of `sources` that has any; return that directory, or None.

    Raises:
        Refused: one of them is a link out of its directory, or no file.
    """
    for source in sources:
        found = [path for pattern in TOKENIZER_FILES for path in source.glob(pattern)]
        files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path])]
        for path in files:
            copy = dst / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(inside(source, path), copy)
        if files:
            return source
    return None
