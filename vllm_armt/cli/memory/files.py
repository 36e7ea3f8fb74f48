"""`vllm-armt memory export` and `import`: a memory as one file."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from vllm_armt.cli.memory import options

STANDARD = Path("-")

Output = Annotated[Path, typer.Argument(metavar="FILE", help="New file, or - for standard output.")]
Input = Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote, or - for standard input.")]
NewName = Annotated[str | None, typer.Option("--name", help="[default: the one that it was exported with]")]


def export(
    directory: options.Directory,
    memory: options.Reference,
    file: Output,
    memories: options.Folder,
    dtype: options.Dtype = None,
    cache_salt: options.Salt = None,
) -> None:
    """Write a memory as one safetensors file, with its state and all that is known of it but its salt."""
    from vllm_armt.cli.memory.stores import find, open_stores
    from vllm_armt.memories.disk.archive import export_memory
    from vllm_armt.memories.disk.files import new_file, write_all

    if file != STANDARD and file.exists():
        raise ValueError(f"{file} exists. Give a new file, or remove it first.")
    store = find(open_stores(directory, memories, dtype), memory, cache_salt)
    archive = export_memory(store, memory, salt=cache_salt)
    with closing(archive):
        if file == STANDARD:
            sys.stdout.buffer.writelines(archive)
            return
        with new_file(file, time.time_ns()) as fd:
            for part in archive:
                write_all(fd, part)


def import_(
    directory: options.Directory,
    file: Input,
    memories: options.Folder,
    name: NewName = None,
    max_bytes: options.MaxBytes = None,
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """Take in a memory that was exported, of the same model; it is checked as any other."""
    from vllm_armt.cli.memory.stores import of_archive
    from vllm_armt.cli.memory.tables import print_json, print_memories
    from vllm_armt.memories.disk.archive import import_memory, read_beginning
    from vllm_armt.memories.disk.manifest import KEEP
    from vllm_armt.memories.http.schemas import described

    with ExitStack() as stack:
        source = sys.stdin.buffer if file == STANDARD else stack.enter_context(file.open("rb"))
        beginning = read_beginning(source)
        store = of_archive(beginning, directory, memories, max_bytes)
        taken = import_memory(store, source, name=KEEP if name is None else name, salt=cache_salt, beginning=beginning)
    if as_json:
        print_json(described(taken))
    else:
        print_memories([taken])
