"""Making a memory: from its draft to the one moment at which it exists."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypedDict

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.catalog import Catalog
from vllm_armt.memories.disk.manifest import (
    KEEP,
    Boundary,
    ExpiresAfter,
    Keep,
    Manifest,
    Model,
    chain,
    check_name,
    new_id,
    salt_digest,
)
from vllm_armt.memories.disk.pages import Pages
from vllm_armt.memories.errors import Conflict, InvalidInput, MemoriesError, Missing, NotFound

# what a memory has from its parent unless it is given; keys of Options
INHERITED = ("metadata", "expires_after", "roles")


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


class Build:
    """A memory in the making, for one thread at a time. Left as a context manager without `complete`, it is failed.

    After `announce` every server shows it as in progress, its name is taken, and the page of its last checkpoint is
    safe. It ends with its process: then all servers show it as failed.

    Attributes:
        manifest: what it was drafted or last written with; its boundary is that of `parent`, of `Boundary.start(salt)`,
            or of the last checkpoint.
        parent: the memory that it continues.
    """

    def __init__(
        self,
        catalog: Catalog,
        pages: Pages,
        manifest: Manifest,
        parent: Manifest | None,
        given: frozenset[str],
    ) -> None:
        self.manifest, self.parent = manifest, parent
        self._start, self._drafted = manifest.boundary, manifest
        self._catalog, self._pages, self._given = catalog, pages, given
        self._fd: int | None = None

    @property
    def id(self) -> str:
        return self.manifest.id

    def __enter__(self) -> Build:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            # the words of a foreign error may hold a piece of the text
            what = (
                str(error) if isinstance(error, MemoriesError) else kind.__name__ if kind is not None else "it was left"
            )
            try:
                self.fail(f"It was not completed: {what}")
            except NotFound:
                pass
            finally:
                self._end()

    def announce(self, total: int = 0) -> Build:
        """Put it on disk as in progress.

        Args:
            total: tokens to be read, as far as is known.

        Raises:
            Conflict: the name is taken.
        """
        with files.locked(self._catalog.lock), files.in_words(f"beginning {self.id}"):
            fd = self._catalog.start_build(self.id, total)
            try:
                self._catalog.commit(self.manifest)
            except BaseException:
                self._catalog.end_build(self.id, fd)
                raise
            self._fd = fd
        return self

    def progress(self, read: int, total: int) -> None:
        """Say how many tokens of how many are read. Cheap: 16 bytes, not brought to the disk."""
        if self._fd is not None:
            with files.in_words(f"noting the progress of {self.id}"):
                self._catalog.note_progress(self._fd, read, total)

    def checkpoint(self, boundary: Boundary) -> None:
        """Say how far it is, after a piece: `Store.use(id, unfinished=True)` gives this boundary, and its page is safe.

        Raises:
            Missing: the page is not in the store.
            NotFound: the memory was deleted meanwhile: stop building it.
        """
        with files.locked(self._catalog.lock):
            current = self._current()
            self._write(current, **self._checked(boundary))

    def complete(self, boundary: Boundary, **fields: Any) -> Manifest:
        """Make it a memory: the moment at which all servers list it, and at which the name moves to it from its parent.

        What was not given for it is its parent's: `metadata`, `expires_after` and `roles`, as they are now.

        Args:
            boundary: where the text ends; its page was saved before.
            fields: `roles`, `metadata` or `expires_after`, if they are known only now.

        Raises:
            Conflict: the parent has lost the name since it was read. The build stays open: `rebase` and read again.
            Missing: the page is not in the store.
            NotFound: the memory was deleted meanwhile.
        """
        with files.locked(self._catalog.lock):
            current = self._current()
            if current.status == "completed":
                # it was committed, and the disk failed behind that: nothing is left to do
                self._end()
                return self._catalog.describe(current)
            if self.parent is not None:
                fields = self._inherited(current, self._catalog.read(self.parent.id) or self.parent) | fields
            moving = current.inherits if current.name is None else None
            new = current.change(
                **self._checked(boundary), **fields, status="completed", name=moving or current.name, inherits=None
            )
            committed = self._catalog.commit(new, heir_of=self.parent.id if moving and self.parent else None)
            self._end()
        return committed

    def rebase(self) -> Manifest:
        """After a Conflict: continue the memory that has the name now; gives it, and all is to be read again behind it.

        Raises:
            Conflict: it is no complete memory.
            NotFound: nobody has the name any more.
        """
        with files.locked(self._catalog.lock):
            current = self._current()
            name = current.inherits or ""
            parent = self._catalog.owner(name, current.salt) if name else None
            if parent is None:
                raise NotFound(f"There is no memory {name!r} any more that {self.id} could continue.")
            parent = self._catalog.describe(parent)
            if parent.status != "completed":
                raise Conflict(f"{parent.id}, which has the name {name!r} now, is {parent.status}.", parent.id)
            inherited = self._inherited(current, parent)
            self._write(current, **dict(parent.boundary), **inherited, parent=parent.id, bytes=parent.bytes)
            self._drafted = self._drafted.change(**inherited)
            self.parent, self._start = parent, parent.boundary
        return parent

    def fail(self, error: str) -> None:
        """End it; the memory stays as failed, with this sentence, until it is deleted or a day has passed. One that was
        completed stays so.

        Args:
            error: for the person who asked; nothing of the text. Cut at 1000 characters.

        Raises:
            NotFound: the memory was deleted meanwhile.
        """
        with files.locked(self._catalog.lock):
            if self._fd is not None:
                try:
                    current = self._current()
                    if current.status != "completed":
                        self._write(current, status="failed", error=error[:1000], inherits=None)
                finally:
                    self._end()

    def _current(self) -> Manifest:
        if self._fd is None:
            return self.manifest
        current = self._catalog.read(self.id)
        if current is None:
            raise NotFound(f"{self.id} was deleted while it was being read.")
        return current

    def _inherited(self, current: Manifest, parent: Manifest) -> dict[str, Any]:
        """What it has from its parent: what was not given for it, nor changed of it since."""
        own = {field for field in INHERITED if getattr(current, field) != getattr(self._drafted, field)} | self._given
        return {field: getattr(parent, field) for field in INHERITED if field not in own}

    def _write(self, current: Manifest, **fields: Any) -> None:
        new = current.change(**fields)
        if self._fd is not None:
            self._catalog.commit(new)
        self.manifest = new

    def _end(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._catalog.end_build(self.id, fd)

    def _checked(self, boundary: Boundary) -> Mapping[str, Any]:
        """The fields of a boundary that fits parent and tenant and whose page is there, and the page's bytes."""
        start = self._start
        if boundary.segments < start.segments or (
            boundary.segments == start.segments and boundary.content != start.content
        ):
            raise InvalidInput(f"This is no continuation of {self.parent.id if self.parent else 'an empty text'}.")
        if boundary.segments == start.segments + 1 and boundary.content != chain(start.content, boundary.last):
            raise InvalidInput("The content does not belong to the ids of the last segment, or to another cache_salt.")
        size: int | None = 0
        if boundary.page is not None:
            size = self._pages.bytes_of(boundary.page)
            if size is None:
                raise Missing(
                    f"The page of {boundary.segments} segments was not saved, or is gone; nothing was committed."
                )
        fields = {name: getattr(boundary, name) for name in Boundary.model_fields}
        return fields | {"bytes": size}


def draft(catalog: Catalog, pages: Pages, model: Model, options: Options, now: float) -> Build:
    """A build that is not on disk yet.

    Raises:
        Conflict, InvalidInput, NotFound: as `Store.begin`.
    """
    parent, if_parent, salt = options.get("parent"), options.get("if_parent"), options.get("salt")
    digest = salt_digest(salt)
    given: dict[str, Any] = {}
    if parent is not None:
        if parent.salt != digest or parent.fingerprint != model.fingerprint:
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
    blank = Manifest(id=new_id(), fingerprint=model.fingerprint, created_at=now, status="in_progress")
    start = parent.boundary if parent is not None else Boundary.start(salt)
    manifest = blank.change(
        **dict(start),
        model=model.name,
        identity=dict(model.identity),
        versions=dict(model.versions),
        **given | explicit,
        name=None if name is None else check_name(name),
        inherits=inherits,
        parent=None if parent is None else parent.id,
        bytes=0 if parent is None else parent.bytes,
        salt=digest,
    )
    return Build(catalog, pages, manifest, parent, frozenset(explicit))
