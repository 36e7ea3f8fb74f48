"""`vllm-armt memory build` and `append`: texts of any length, read into memories."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from vllm_armt.cli.memory import options
from vllm_armt.cli.memory.files import STANDARD

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_armt.memories.disk.manifest import Manifest
    from vllm_armt.memories.reading import Reading

CPU_PIECE = 1 << 14
"""Tokens between two looks at how far it is, on a CPU, where a save is cheap beside reading."""

Texts = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Texts in UTF-8, one behind the other; - for standard input.")
]
Name = Annotated[str | None, typer.Option(help="What the memory is called. [default: nothing, it has an id]")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="To be kept with it; up to 16.")]
Expires = Annotated[int | None, typer.Option(metavar="SECONDS", help="When it expires. [default: never]")]
Anchor = Annotated[Literal["created_at", "last_used_at"], typer.Option(help="From when the seconds count.")]
IfParent = Annotated[str | None, typer.Option(metavar="ID", help="Refuse unless the memory has this id still.")]


def build(
    directory: options.Directory,
    files: Texts,
    memories: options.Folder,
    name: Name = None,
    metadata: Metadata = None,
    expires_after: Expires = None,
    expires_anchor: Anchor = "created_at",
    dtype: options.ServedDtype = "auto",
    engine: options.Engine = "{}",
    max_bytes: options.MaxBytes = None,
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """Read texts of any length into a new memory.

    Servers with the same model, dtype and folder can be asked about it at once. RAM does not grow with the text.
    """
    from vllm_armt.cli.memory.engine import engine as started
    from vllm_armt.memories.disk.manifest import check_name

    given: dict[str, Any] = {
        "name": None if name is None else check_name(name),
        "salt": cache_salt,
        **_extras(metadata, expires_after, expires_anchor),
    }
    with _text(files) as text, started(directory, memories, dtype, max_bytes, engine) as llm:
        _print(_read(llm, text, begins=True, **given), as_json)


def append(
    directory: options.Directory,
    memory: options.Reference,
    files: Texts,
    memories: options.Folder,
    if_parent: IfParent = None,
    metadata: Metadata = None,
    expires_after: Expires = None,
    expires_anchor: Anchor = "created_at",
    dtype: options.ServedDtype = "auto",
    engine: options.Engine = "{}",
    max_bytes: options.MaxBytes = None,
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """Read more behind a memory: a new one, to which its name moves. The old one stays until it is removed."""
    from vllm_armt.cli.memory.engine import engine as started

    given: dict[str, Any] = {"salt": cache_salt, **_extras(metadata, expires_after, expires_anchor)}
    if if_parent is not None:
        given["if_parent"] = if_parent
    with _text(files) as text, started(directory, memories, dtype, max_bytes, engine) as llm:
        _print(_read(llm, text, begins=False, parent=memory, **given), as_json)


def _extras(metadata: list[str] | None, seconds: int | None, anchor: Anchor) -> dict[str, Any]:
    """What was given of a memory's metadata and expiry."""
    from pydantic import ValidationError

    from vllm_armt.memories.disk.manifest import ExpiresAfter, explain

    given: dict[str, Any] = {}
    if metadata:
        if wrong := [pair for pair in metadata if "=" not in pair]:
            raise ValueError(f"--metadata is {wrong[0]!r}; write KEY=VALUE.")
        given["metadata"] = dict(pair.split("=", 1) for pair in metadata)
    if seconds is not None:
        try:
            given["expires_after"] = ExpiresAfter(anchor=anchor, seconds=seconds)
        except ValidationError as error:
            raise ValueError(f"--expires-after is {seconds}: {explain(error)}.") from None
    return given


@contextmanager
def _text(files: Sequence[Path]) -> Iterator[BinaryIO]:
    """All texts as one file, which is on disk."""
    if len(files) == 1 and files[0] != STANDARD:
        with files[0].open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as whole:
        for path in files:
            if path == STANDARD:
                shutil.copyfileobj(sys.stdin.buffer, whole)
            else:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        yield whole  # type: ignore[misc]


def _read(llm: LLM, text: BinaryIO, *, begins: bool, parent: str | None = None, **given: Any) -> Manifest:
    """Read a text into a memory, with a progress bar on stderr.

    Args:
        begins: whether a text begins here, so that what a tokenizer puts before one belongs to it.
        parent: the memory that it continues.
        given: options of the memory.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from vllm.platforms import current_platform

    from vllm_armt.memories.identity import open_store
    from vllm_armt.memories.reading import read, read_with
    from vllm_armt.memories.texts import file_tokens, leading_ids

    config, tokenizer = llm.llm_engine.vllm_config, llm.get_tokenizer()
    store = open_store(config)
    if parent is not None:
        given["parent"] = store.get(parent, salt=given["salt"])
    tokens = file_tokens(
        lambda words: tokenizer.encode(words, add_special_tokens=False),
        text,
        leading_ids(tokenizer) if begins else (),
    )
    reading = read(
        store,
        tokens,
        segment_size=config.cache_config.block_size,
        max_model_len=config.model_config.max_model_len,
        piece_tokens=CPU_PIECE if current_platform.is_cpu() else None,
        total=tokens.total,
        **given,
    )
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        return read_with(llm, _watched(reading, progress, tokens.total))


def _watched(reading: Reading, progress: Any, total: int) -> Reading:
    """The same reading, shown piece by piece."""
    task, done = progress.add_task("reading", total=total), 0
    try:
        piece = next(reading)
        while True:
            output = yield piece
            done += len(piece.prompt["prompt_token_ids"])
            progress.update(task, completed=done, total=max(total, done))
            piece = reading.send(output)
    except StopIteration as stop:
        progress.update(task, completed=done, total=done)
        return stop.value
    finally:
        reading.close()


def _print(memory: Manifest, as_json: bool) -> None:
    from vllm_armt.cli.memory.tables import print_json, print_memories
    from vllm_armt.memories.http.schemas import described

    if as_json:
        print_json(described(memory))
    else:
        print_memories([memory])
