"""`vllm-armt memory list` and `show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_armt.cli.memory import options

if TYPE_CHECKING:
    from vllm_armt.memories.disk.manifest import Manifest
    from vllm_armt.memories.disk.store import Store

PAGE = 1000


def list_(
    directory: options.Directory,
    memories: options.Folder,
    dtype: options.Dtype = None,
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """List a model's memories, the newest first."""
    from vllm_armt.cli.memory.stores import open_stores
    from vllm_armt.cli.memory.tables import print_json, print_memories
    from vllm_armt.memories.http.schemas import described

    found = [memory for store in open_stores(directory, memories, dtype) for memory in _all(store, cache_salt)]
    found.sort(key=lambda memory: -memory.created_at)
    if as_json:
        print_json({"object": "list", "data": [described(memory) for memory in found]})
    else:
        print_memories(found)


def show(
    directory: options.Directory,
    memory: options.Reference,
    memories: options.Folder,
    dtype: options.Dtype = None,
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """Show all that is known of one memory."""
    from rich.table import Table

    from vllm_armt.cli.memory.stores import find, open_stores
    from vllm_armt.cli.memory.tables import moment, print_json, print_table, size, status
    from vllm_armt.memories.http.schemas import described

    store = find(open_stores(directory, memories, dtype), memory, cache_salt)
    found = store.get(memory, salt=cache_salt)
    if as_json:
        print_json(described(found) | {"pending": len(found.pending), "roles": found.roles} | _model(found))
        return
    table = Table(show_header=False)
    facts = {
        "id": found.id,
        "name": found.name or "-",
        "status": status(found),
        "error": found.error,
        "parent": found.parent,
        "tokens": f"{found.tokens:,} ({found.segments:,} segments and {len(found.pending)} tokens)",
        "bytes": size(found.bytes),
        "roles": ", ".join(found.roles),
        "made": moment(found.created_at),
        "last used": moment(found.last_used_at),
        "expires": moment(found.expires_at) if found.expires_after else "never",
        **{f"metadata: {key}": value for key, value in found.metadata.items()},
        "model": found.model,
        **found.identity,
        "fingerprint": found.fingerprint,
        "made by": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    for key, value in facts.items():
        if value:
            table.add_row(key, value)
    print_table(table)


def _all(store: Store, salt: str | None) -> Iterator[Manifest]:
    after, more = None, True
    while more:
        page, more = store.list(salt=salt, after=after, limit=PAGE)
        yield from page
        after = page[-1].id if page else None


def _model(memory: Manifest) -> dict[str, dict[str, str]]:
    return {"identity": memory.identity, "versions": memory.versions}
