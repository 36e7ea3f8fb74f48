"""Memories that last, on disk: texts that a model has read, by id or name, for every server that shares the folder.

    DIR/<fingerprint>/
        memories/<id>.json               a manifest (`manifest.Manifest`), sealed with its checksum
        names/<name>[@<salt>].json       which memory a name leads to (`catalog`)
        pages/<content>.safetensors      the state after the last closed segment, all layers (`pages`)
        prefix/<key>.safetensors         the second tier of the prefix cache: pages without a manifest
        builds/<id>                      locked by the process that is reading the memory; its progress
        lock                             held for moments by who changes manifests and names, or removes anything

    store = Store(directory, Model(fingerprint, "my-armt", identity={"weights": digest, "dtype": "float32"}))

    boundary = Boundary.start(salt).read(ids, closed=96, segment_size=32)
    store.pages.save(boundary.page, tensors)                          # the page first, by a thread
    memory = store.create(boundary, name="war-and-peace", salt=salt)  # then the manifest: now it exists

    with store.use("war-and-peace", salt=salt) as lease:              # from admission to the end of the load, at least
        memory = lease.memory
        prompt = [*memory.last, *memory.pending, *question]
        tensors = store.pages.load(memory.page, expected)             # in any process
        ...                                                           # the request's own text is read
        store.pages.save(longer.page, new_tensors)
        store.create(longer, parent=memory, salt=salt)                # an append: the name moves, the old memory stays

Every method with `salt` sees the memories of that `cache_salt` only, None those without; others' are NotFound. All
methods raise `errors.MemoriesError`, which knows its HTTP status; nothing else is raised for what a client or a disk
did. Methods may be called from any thread; those that write wait for the disk, so the event loop and the engine's step
call them in a thread. `archive` has export and import. No log line or message holds token ids or words of a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.builds import Build, Options, draft
from vllm_armt.memories.disk.catalog import Catalog
from vllm_armt.memories.disk.manifest import (
    KEEP,
    Boundary,
    ExpiresAfter,
    Keep,
    Manifest,
    Model,
    check_name,
    is_id,
    salt_digest,
)
from vllm_armt.memories.disk.pages import Hold, Pages
from vllm_armt.memories.disk.tensorfile import Spec
from vllm_armt.memories.disk.upkeep import Collected, Finding, Upkeep
from vllm_armt.memories.errors import Conflict, Expired, InvalidInput, MemoriesError, Missing, NotFound, WrongModel

GRACE_SECONDS = 60.0
FOLDERS = ("memories", "names", "pages", "prefix", "builds")


class Lease:
    """A memory whose page nobody evicts until `release`, or until this process ends. A context manager.

    Attributes:
        memory: as it was when the lease began. Without a page it is all that there is, and nothing need be kept.
    """

    def __init__(self, memory: Manifest, hold: Hold | None) -> None:
        self.memory, self._hold = memory, hold

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._hold is not None:
            self._hold.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Store:
    """The memories of one model in a folder that any number of servers share.

    Args:
        directory: may hold the memories of other models too; made if it isn't there.
        model: whose memories they are.
        max_bytes: of all files of this model in this folder; None: no bound. Every server that writes checks its own.
        grace: seconds for which a page without a manifest is left alone.
        clock: seconds since the epoch.

    Attributes:
        catalog: the manifests and names, for this package.
        pages: of memories, by `Boundary.page`: `pages.save(key, tensors)`, `pages.load(key, expected)`.
        prefix: pages by the hash of a block, for prefixes of ordinary prompts: `prefix.save(key, tensors)`, `key in
            prefix`, `prefix.load(key, expected)`, `prefix.hold(key)`. Evicted by last save or load, like unnamed
            memories.

    Raises:
        StorageFailed: the folder can't be made.
    """

    def __init__(
        self,
        directory: Path,
        model: Model,
        *,
        max_bytes: int | None = None,
        grace: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory, self.model, self.max_bytes = Path(directory), model, max_bytes
        self.clock = clock
        with files.in_words(f"making the folder {self.directory}"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = files.make_folder(self.directory / model.fingerprint)
        for part in FOLDERS:
            files.make_folder(own / part)
        self.catalog = Catalog(own, model.fingerprint, clock)
        lock = self.catalog.lock
        self.pages = Pages(own / "pages", model.fingerprint, lock, self._make_room, clock=clock)
        self.prefix = Pages(own / "prefix", model.fingerprint, lock, self._make_room, notes_use=True, clock=clock)
        self._upkeep = Upkeep(self.catalog, self.pages, self.prefix, grace, clock)

    # looking up -----------------------------------------------------------------------------------------------------

    def get(self, reference: str, *, salt: str | None = None) -> Manifest:
        """A memory by id or name, as it is now; also one in progress or failed (`status`). Not a use of it.

        Raises:
            InvalidInput: the reference can be neither id nor name.
            NotFound: there is none, or it has another salt.
            WrongModel: there is one, of another model; what differs is named.
            Expired: its time is over.
            Damaged: its manifest or the file of its name is damaged.
        """
        memory = self._find(reference, salt)
        if memory.status == "expired":
            raise Expired(f"The memory {reference!r} has expired.")
        return memory

    def use(self, reference: str, *, salt: str | None = None, unfinished: bool = False) -> Lease:
        """A memory to continue, with its page kept from eviction; notes the time as its last use.

        Args:
            unfinished: allow one in progress, as it was at its last checkpoint: for who is building it.

        Raises:
            Conflict: it is in progress or failed.
            Missing: its page is gone.
            InvalidInput, NotFound, WrongModel, Expired, Damaged: as `get`.
        """
        while True:
            memory = self.get(reference, salt=salt)
            if memory.status != "completed" and not (unfinished and memory.status == "in_progress"):
                why = "is still being read" if memory.status == "in_progress" else f"could not be made: {memory.error}"
                raise Conflict(f"The memory {reference!r} {why}", memory.id)
            try:
                hold = None if memory.page is None else self.pages.hold(memory.page)
            except Missing as error:
                # evicted since it was looked up, or a name that has moved on? Then the look-up gives something else now
                again = self.get(reference, salt=salt)
                if (again.id, again.page) == (memory.id, memory.page):
                    raise Missing(f"The memory {reference!r} can't be used. {error}") from None
                continue
            self.catalog.touch(memory)
            return Lease(memory, hold)

    def list(
        self, *, salt: str | None = None, after: str | None = None, limit: int = 20
    ) -> tuple[Sequence[Manifest], bool]:
        """A tenant's memories, the newest first, of every status; damaged ones are left to `verify`.

        Args:
            after: id of the last memory of the page before.
            limit: 1 to 1000.

        Returns:
            At most `limit` memories, and whether more follow.

        Raises:
            InvalidInput: `limit` is out of range.
            NotFound: there is no memory `after`.
        """
        if not 1 <= limit <= 1000:
            raise InvalidInput(f"limit is {limit}; allowed are 1 to 1000.")
        digest = salt_digest(salt)
        found = [memory for memory in self.catalog.scan() if memory.salt == digest]
        found.sort(key=lambda memory: (-memory.created_at, memory.id))
        begin = 0
        if after is not None:
            begin = next((i + 1 for i, memory in enumerate(found) if memory.id == after), 0)
            if not begin:
                raise NotFound(f"There is no memory {after[:200]!r} to go on after; list from the beginning.")
        return [self.catalog.describe(memory) for memory in found[begin : begin + limit]], begin + limit < len(found)

    def _find(self, reference: str, salt: str | None) -> Manifest:
        digest = salt_digest(salt)
        while (memory := _look_up(self.catalog, reference, digest)) is not None:
            described = self.catalog.describe(memory)
            if is_id(reference) or described.name == reference:
                return described
            # the name has moved on since: what is appended to a memory without it would be lost to the name
        for folder in sorted(self.directory.iterdir()):
            known = folder / "memories"
            if (
                folder.name != self.model.fingerprint
                and known.is_dir()
                and not (folder.is_symlink() or known.is_symlink())
            ):
                try:
                    other = _look_up(Catalog(folder, folder.name), reference, digest)
                except MemoriesError:
                    # other models' damage is not for who asks this one
                    continue
                if other is not None:
                    raise WrongModel(
                        f"The memory {reference!r} is of another model: {self.model.differences(other)}.", other.id
                    )
        raise NotFound(f"There is no memory {reference!r}.")

    # making ---------------------------------------------------------------------------------------------------------

    def create(self, boundary: Boundary, **options: Unpack[Options]) -> Manifest:
        """A complete memory in one step; its page was saved before. With a parent this is an append.

        Args:
            boundary: where its text ends.
            options: see `Options`.

        Raises:
            Conflict: the name is taken, or has moved on from the parent; the parent is not `if_parent`.
            Missing: the page is not in the store.
            InvalidInput: the boundary does not continue the parent or belongs to another salt; a value is not allowed.
            NotFound: the parent is of another salt.
        """
        return draft(self.catalog, self.pages, self.model, options, self.clock()).complete(boundary)

    def begin(self, total: int = 0, **options: Unpack[Options]) -> Build:
        """A memory that takes time: on disk at once as in progress, seen by all servers, its name taken.

        Args:
            total: tokens to be read, as far as is known.
            options: see `Options`.

        Raises:
            Conflict: the name is taken; the parent is not `if_parent`, or not complete.
            InvalidInput: a value is not allowed.
            NotFound: the parent is of another salt.
        """
        return draft(self.catalog, self.pages, self.model, options, self.clock()).announce(total)

    # changing -------------------------------------------------------------------------------------------------------

    def update(
        self,
        reference: str,
        *,
        name: str | Keep | None = KEEP,
        metadata: dict[str, str] | Keep = KEEP,
        expires_after: ExpiresAfter | Keep | None = KEEP,
        salt: str | None = None,
    ) -> Manifest:
        """Change what is given; None takes the name away, or lets it never expire.

        Raises:
            Conflict: the name is taken.
            InvalidInput, NotFound, WrongModel, Expired, Damaged: as `get`.
        """
        changes: dict[str, Any] = {"name": name, "metadata": metadata, "expires_after": expires_after}
        changes = {field: value for field, value in changes.items() if value is not KEEP}
        if changes.get("name") is not None:
            check_name(changes["name"])
        with files.locked(self.catalog.lock):
            memory = self.get(reference, salt=salt)
            stored = self.catalog.read(memory.id)
            assert stored is not None, "manifests are removed under the lock only"
            return self.catalog.commit(stored.change(**{"name": memory.name} | changes))

    def delete(self, reference: str, *, salt: str | None = None) -> Manifest:
        """Delete a memory, also an expired one or one in progress, whose builder then stops; gives what it was.

        Its page goes too if no other memory has it, or later by `gc` if it is in use or was saved within the grace.
        Requests that use it are not disturbed.

        Raises:
            InvalidInput, NotFound, WrongModel, Damaged: as `get`.
        """
        with files.locked(self.catalog.lock):
            memory = self._find(reference, salt)
            self._upkeep.drop(memory)
        return memory

    # upkeep ---------------------------------------------------------------------------------------------------------

    def usage(self) -> int:
        """Bytes that count for `max_bytes`."""
        return self._upkeep.usage()

    def gc(self) -> Collected:
        """Remove what nobody needs: see `Upkeep.gc`. For every server to call now and then."""
        return self._upkeep.gc()

    def verify(self, expected: Spec | None = None) -> Sequence[Finding]:
        """Read all, of all tenants, and say what is damaged or missing: see `Upkeep.verify`."""
        return self._upkeep.verify(expected)

    def discard(self, finding: Finding) -> None:
        """Remove a file that `verify` found damaged. What depends on it is lost, if it was not before."""
        with files.locked(self.catalog.lock), files.in_words("removing a damaged file"):
            finding.path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if self.max_bytes is not None:
            self._upkeep.make_room(self.max_bytes, needed)


def _look_up(catalog: Catalog, reference: str, salt: str | None) -> Manifest | None:
    memory = catalog.read(reference) if is_id(reference) else catalog.owner(reference, salt)
    return memory if memory is not None and memory.salt == salt else None
