"""`vllm-armt memory rm`, `gc` and `verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vllm_armt.cli.memory import options

Names = Annotated[list[str], typer.Argument(metavar="MEMORY...", help="Names or ids of memories.")]
Discard = Annotated[bool, typer.Option("--discard", help="Remove every file that is damaged, and what can't be used.")]


def rm(
    directory: options.Directory,
    memory: Names,
    memories: options.Folder,
    dtype: options.Dtype = None,
    cache_salt: options.Salt = None,
) -> None:
    """Delete memories. Requests that use one are not disturbed; its state goes when nothing else has it."""
    from vllm_armt.cli.memory.stores import find, open_stores

    stores = open_stores(directory, memories, dtype)
    # all or none: a wrong name is said before anything is gone
    for name, store in [(name, find(stores, name, cache_salt)) for name in memory]:
        print(store.delete(name, salt=cache_salt).id)


def gc(
    directory: options.Directory,
    memories: options.Folder,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove what nobody needs: expired memories, failed ones of a day ago, state of no memory, left-over files."""
    from vllm_armt.cli.memory.stores import open_stores
    from vllm_armt.cli.memory.tables import print_json, size

    done = [asdict(store.gc()) for store in open_stores(directory, memories, dtype)]
    total = {
        key: sum(one[key] for one in done) for key in ("expired", "failed", "pages", "names", "temporary", "bytes")
    }
    if as_json:
        print_json(total)
    else:
        freed = size(total.pop("bytes"))
        print(", ".join(f"{key} {number}" for key, number in total.items()) + f": {freed} freed")


def verify(
    directory: options.Directory,
    memories: options.Folder,
    dtype: options.Dtype = None,
    discard: Discard = False,
    as_json: options.AsJson = False,
) -> None:
    """Read all that is kept, of all salts, and say what is damaged or missing; ends with 1 if anything is."""
    from vllm_armt.cli.memory.stores import open_stores
    from vllm_armt.cli.memory.tables import print_json

    found = [(store, finding) for store in open_stores(directory, memories, dtype) for finding in store.verify()]
    if as_json:
        print_json(
            [
                {"path": str(one.path), "memory": one.memory, "error": str(one.error), "discarded": discard}
                for _, one in found
            ]
        )
    for store, finding in found:
        if not as_json:
            print(f"{finding.memory or '-'}: {finding.error}")
        if discard:
            store.discard(finding)
    if not found and not as_json:
        print("All is as it was written.")
    if found and not discard:
        raise typer.Exit(1)
