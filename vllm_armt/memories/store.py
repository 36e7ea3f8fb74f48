"""Memories that last, on disk: texts that a model has read, by id or name, for every server that shares the folder.

    DIR/<fingerprint>/
        memories/<id>.json               a manifest (`manifest.Manifest`), sealed with its checksum
        names/<name>[@<salt>].json       which memory a name leads to (`catalog`)
        pages/<content>.safetensors      the state after the last closed segment, all layers (`pages`)
        prefix/<key>.safetensors         the second tier of the prefix cache: pages without a manifest
        builds/<id>                      locked by the process that is reading the memory; its progress
        lock                             held for moments by who changes manifests and names, or removes anything

    store = Store(directory, fingerprint, model="my-armt", identity={"weights": digest, "dtype": "float32"})

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
call them in a thread. No log line or message holds token ids or words of a text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypedDict, Unpack

from vllm_armt.memories import files
from vllm_armt.memories.archive import Archive, Import
from vllm_armt.memories.builds import INHERITED, Build
from vllm_armt.memories.catalog import Catalog
from vllm_armt.memories.errors import Conflict, Expired, InvalidInput, MemoriesError, Missing, NotFound, WrongModel
from vllm_armt.memories.manifest import (
    KEEP,
    Boundary,
    ExpiresAfter,
    Keep,
    Manifest,
    check_name,
    is_id,
    new_id,
    salt_digest,
)
from vllm_armt.memories.pages import Hold, Pages
from vllm_armt.memories.tensorfile import Spec
from vllm_armt.memories.upkeep import Collected, Finding, Upkeep

GRACE_SECONDS = 60.0
FOLDERS = ("memories", "names", "pages", "prefix", "builds")


class Options(TypedDict, total=False):
    """What a new memory may be given.

    name: `KEEP`, the default: the name of the parent, which moves to the new memory when that completes, if the parent
        still has it; none without a parent. None: no name. Another name must be free; it leaves the parent its own.
    parent: the memory that it continues, as `get` or `use` gave it.
    if_parent: refuse unless the parent has this id.
    roles: of a chat, of all its messages; a tuple.
    metadata: at most 16 pairs, keys of 1 to 64 characters, values up to 512.
    expires_after: None: never.
    salt: the caller's cache_salt.

    What is left out of `roles`, `metadata` and `expires_after` is the parent's at the moment when the memory completes.
    """

    name: str | Keep | None
    parent: Manifest | None
    if_parent: str | None
    roles: tuple[str, ...]
    metadata: dict[str, str]
    expires_after: ExpiresAfter | None
    salt: str | None


class Lease:
    """A memory whose page nobody evicts until `release`, or until this process ends. A context manager.

    Attributes:
        memory: as it was when the lease began.
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
        fingerprint: of the model, as computed elsewhere: 1 to 128 letters, digits, "_" and "-".
        model: its name, for people.
        identity: what the fingerprint is a hash of, so that a memory of another model is refused with what differs.
        versions: of the software, noted in manifests.
        max_bytes: of all files of this model in this folder; None: no bound. Every server that writes checks its own.
        grace: seconds for which a page without a manifest is left alone.
        clock: seconds since the epoch.

    Attributes:
        pages: of memories, by `Boundary.page`: `pages.save(key, tensors)`, `pages.load(key, expected)`.
        prefix: pages by the hash of a block, for prefixes of ordinary prompts: `prefix.save(key, tensors)`, `key in
            prefix`, `prefix.load(key, expected)`, `prefix.hold(key)`. Evicted by last save or load, like unnamed
            memories.

    Raises:
        InvalidInput: the fingerprint can't be a folder's name.
        StorageFailed: the folder can't be made.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        *,
        model: str = "",
        identity: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
        grace: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", fingerprint):
            raise InvalidInput(f"{fingerprint[:200]!r} is no fingerprint: 1 to 128 letters, digits, '_' and '-'.")
        self.directory, self.fingerprint, self.max_bytes = Path(directory), fingerprint, max_bytes
        self._model, self._identity, self._versions = model, dict(identity or {}), dict(versions or {})
        self._clock = clock
        with files.in_words(f"making the folder {self.directory}"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = files.make_folder(self.directory / fingerprint)
        for part in FOLDERS:
            files.make_folder(own / part)
        self._catalog = Catalog(own, fingerprint, clock)
        lock = self._catalog.lock
        self.pages = Pages(own / "pages", fingerprint, lock, self._make_room, clock=clock)
        self.prefix = Pages(own / "prefix", fingerprint, lock, self._make_room, notes_use=True, clock=clock)
        self._upkeep = Upkeep(self._catalog, self.pages, self.prefix, grace, clock)

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
            self._catalog.touch(memory)
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
        found = [memory for memory in self._catalog.scan() if memory.salt == digest]
        found.sort(key=lambda memory: (-memory.created_at, memory.id))
        begin = 0
        if after is not None:
            begin = next((i + 1 for i, memory in enumerate(found) if memory.id == after), 0)
            if not begin:
                raise NotFound(f"There is no memory {after[:200]!r} to go on after; list from the beginning.")
        return [self._catalog.describe(memory) for memory in found[begin : begin + limit]], begin + limit < len(found)

    def _find(self, reference: str, salt: str | None) -> Manifest:
        digest = salt_digest(salt)
        memory = _look_up(self._catalog, reference, digest)
        if memory is not None:
            return self._catalog.describe(memory)
        for folder in sorted(self.directory.iterdir()):
            if folder.name != self.fingerprint and not folder.is_symlink() and (folder / "memories").is_dir():
                try:
                    other = _look_up(Catalog(folder, folder.name), reference, digest)
                except MemoriesError:
                    # other models' damage is not for who asks this one
                    continue
                if other is not None:
                    raise WrongModel(
                        f"The memory {reference!r} is of another model: {self._differences(other)}.", other.id
                    )
        raise NotFound(f"There is no memory {reference!r}.")

    def _differences(self, other: Manifest) -> str:
        ours = {"model": self._model} | self._identity
        theirs = {"model": other.model} | other.identity
        differ = [
            f"{key} is {theirs.get(key, 'not stated')!r} there, {ours.get(key, 'not stated')!r} here"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]
        return "; ".join(differ or [f"its fingerprint is {other.fingerprint}, this one's is {self.fingerprint}"])

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
        return self._draft(options).complete(boundary)

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
        return self._draft(options).announce(total)

    def _draft(self, options: Options) -> Build:
        parent, if_parent, salt = options.get("parent"), options.get("if_parent"), options.get("salt")
        digest = salt_digest(salt)
        given: dict[str, Any] = {}
        if parent is not None:
            if parent.salt != digest or parent.fingerprint != self.fingerprint:
                raise NotFound(f"There is no memory {parent.id}.")
            if parent.status != "completed":
                raise Conflict(f"{parent.id} is {parent.status}; only a complete memory can be continued.", parent.id)
            given = {field: getattr(parent, field) for field in INHERITED}
        if if_parent is not None and (parent is None or parent.id != if_parent):
            current = None if parent is None else parent.id
            raise Conflict(f"Somebody was faster: the memory is {current} now, not {if_parent}.", current)
        explicit: dict[str, Any] = {
            field: options[field]  # type: ignore[literal-required]
            for field in INHERITED
            if field in options
        }
        name, inherits = options.get("name", KEEP), None
        if isinstance(name, Keep) or (parent is not None and name is not None and name == parent.name):
            name, inherits = None, None if parent is None else parent.name
        blank = Manifest(id=new_id(), fingerprint=self.fingerprint, created_at=self._clock(), status="in_progress")
        start = parent.boundary if parent is not None else Boundary.start(salt)
        manifest = blank.change(
            **dict(start),
            model=self._model,
            identity=self._identity,
            versions=self._versions,
            **given | explicit,
            name=None if name is None else check_name(name),
            inherits=inherits,
            parent=None if parent is None else parent.id,
            bytes=0 if parent is None else parent.bytes,
            salt=digest,
        )
        return Build(self._catalog, self.pages, manifest, parent, frozenset(explicit))

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
        with files.locked(self._catalog.lock):
            memory = self.get(reference, salt=salt)
            stored = self._catalog.read(memory.id)
            if stored is not None:
                self._catalog.commit(stored.change(**{"name": memory.name} | changes))
            stored = self._catalog.read(memory.id)
        assert stored is not None, "manifests are removed under the lock only"
        return self._catalog.describe(stored)

    def delete(self, reference: str, *, salt: str | None = None) -> Manifest:
        """Delete a memory, also an expired one or one in progress, whose builder then stops; gives what it was.

        Its page goes too if no other memory has it, or later by `gc` if it is in use or was saved within the grace.
        Requests that use it are not disturbed.

        Raises:
            InvalidInput, NotFound, WrongModel, Damaged: as `get`.
        """
        with files.locked(self._catalog.lock):
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
        with files.locked(self._catalog.lock), files.in_words("removing a damaged file"):
            finding.path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if self.max_bytes is not None:
            self._upkeep.make_room(self.max_bytes, needed)

    # archives -------------------------------------------------------------------------------------------------------

    def export(self, reference: str, *, salt: str | None = None) -> Archive:
        """A memory as one file: iterate the result for its bytes, `result.bytes` of them, or close it.

        Raises:
            Conflict: it is in progress or failed.
            Missing, Damaged: its page, which is read and checked before this returns.
            InvalidInput, NotFound, WrongModel, Expired: as `get`.
        """
        with self.use(reference, salt=salt) as lease:
            return Archive(lease.memory, self.pages)

    def import_memory(
        self,
        file: BinaryIO,
        *,
        name: str | Keep | None = KEEP,
        salt: str | None = None,
        expected: Spec | None = None,
        limit: int | None = None,
    ) -> Manifest:
        """A memory from an exported file, read as a stream and written as it is read. Keeps its id if that is free.

        Args:
            file: with `read(n)`; from its position to its end.
            name: `KEEP`: the one that it was exported with.
            expected: dtypes and shapes of this model's pages; others are refused before the data are read.
            limit: bytes of data that are taken at most.

        Raises:
            InvalidInput: it is no archive, cut, or damaged.
            WrongModel: it is of another model or layout.
            TooLarge: it is larger than `limit`, or than `max_bytes` has room for.
            Conflict: the name is taken.
        """
        archive = Import(file, limit)
        exported = archive.manifest
        if exported.fingerprint != self.fingerprint or exported.status != "completed":
            raise WrongModel(f"The archive is of another model: {self._differences(exported)}.")
        build = self._draft({"name": exported.name if isinstance(name, Keep) else name, "salt": salt})
        if exported.page is None:
            content = build.manifest.content
            for _ in archive.data():
                pass
        else:
            content = archive.key(salt)
            if expected is not None:
                self.pages.check_spec("The archive", archive.page.spec, expected)
            self.pages.write(content, archive.page, archive.data())
        boundary = exported.boundary.model_copy(update={"content": content})
        with files.locked(self._catalog.lock):
            id = exported.id if self._catalog.read(exported.id) is None else new_id()
            memory = build.manifest.change(
                **dict(boundary),
                id=id,
                status="completed",
                roles=exported.roles,
                metadata=exported.metadata,
                expires_after=exported.expires_after,
                versions=exported.versions,
                bytes=0 if boundary.page is None else self.pages.bytes_of(boundary.page) or 0,
            )
            self._catalog.commit(memory)
            return self._catalog.describe(memory)


def _look_up(catalog: Catalog, reference: str, salt: str | None) -> Manifest | None:
    memory = catalog.read(reference) if is_id(reference) else catalog.owner(reference, salt)
    return memory if memory is not None and memory.salt == salt else None
