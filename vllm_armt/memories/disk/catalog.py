"""The manifests of one model's folder, the names that lead to them, and whether the builder of one still lives.

**A name is one small file** with the id of one memory or, for the moment of a move, of two: the new one and the one
that had it. The first whose manifest bears the name has it. So the rename of a manifest is the one moment at which a
memory exists, takes a name, or gives it up: before it the name leads to the old memory, after it to the new one, and a
crash between any two steps leaves one of the two.

**A build in progress is on disk**, since a client may ask any of the servers that share the folder how far it is, and
its name must be taken for all of them. Its builder holds a lock on a file in `builds`; when the process is gone so is
the lock, and all see the build as failed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from pydantic import ValidationError

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import Manifest, explain
from vllm_armt.memories.errors import Conflict, Damaged, MemoriesError

logger = logging.getLogger(f"vllm.{__name__}")

_PROGRESS = struct.Struct("<QQ")
# two changes within one tick of a file system's clock can't be told apart by its times; no tick is longer than this
_TICK_NS = 100_000_000


class Catalog:
    """Manifests and names in `DIR/<fingerprint>`. Thread-safe.

    Methods that say "locked" must be called with `lock` held (`files.locked(catalog.lock)`).
    """

    def __init__(self, directory: Path, fingerprint: str, clock: Callable[[], float] = time.time) -> None:
        self.directory, self.fingerprint, self._clock = directory, fingerprint, clock
        self.memories, self.names, self.builds = (directory / part for part in ("memories", "names", "builds"))
        self.lock = directory / "lock"
        self._cache: dict[str, tuple[tuple[int, int, int, int], Manifest]] = {}

    # reading --------------------------------------------------------------------------------------------------------

    def path(self, id: str) -> Path:
        return self.memories / f"{id}.json"

    def read(self, id: str) -> Manifest | None:
        """A manifest as it is on disk, with the time of last use; None: there is none.

        Raises:
            Damaged: it isn't as it was written, or belongs elsewhere.
        """
        path = self.path(id)
        with files.in_words(f"reading {path}"):
            try:
                fd = files.open_file(path)
            except FileNotFoundError:
                return None
            with open(fd, "rb") as file:
                data, state = file.read(), os.fstat(fd)
        try:
            manifest = Manifest.model_validate_json(files.unseal(path, data))
        except ValidationError as error:
            raise Damaged(f"{path} is damaged or of a newer version: {explain(error)}.") from None
        if (manifest.id, manifest.fingerprint) != (id, self.fingerprint):
            raise Damaged(
                f"{path} is not at its place: it is the manifest of {manifest.id} of the model {manifest.model!r} with"
                f" the fingerprint {manifest.fingerprint}."
            )
        return manifest.model_copy(update={"last_used_at": state.st_mtime_ns / 1e9})

    def ids(self) -> list[str]:
        """Of all memories of all tenants."""
        with files.in_words(f"listing {self.memories}"):
            return [name.removesuffix(".json") for name in os.listdir(self.memories) if name.endswith(".json")]

    def scan(self, damaged: list[tuple[str, Damaged]] | None = None) -> Iterator[Manifest]:
        """All manifests that can be read, as `read` gives them; only what has changed is read from disk.

        Args:
            damaged: takes ids and errors of the others.
        """
        ids = self.ids()
        for gone in set(self._cache).difference(ids):
            self._cache.pop(gone, None)
        for id in ids:
            try:
                state = self.path(id).lstat()
            except FileNotFoundError:
                continue
            key = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            known = self._cache.get(id)
            if known is not None and known[0] == key:
                yield known[1]
                continue
            try:
                manifest = self.read(id)
            except Damaged as error:
                if damaged is not None:
                    damaged.append((id, error))
                continue
            if manifest is not None:
                if time.time_ns() - state.st_ctime_ns > _TICK_NS:
                    self._cache[id] = key, manifest
                yield manifest

    def name_path(self, name: str, salt: str | None) -> Path:
        """File of a tenant's name; "@" is no character of names."""
        return self.names / (f"{name}.json" if salt is None else f"{name}@{salt}.json")

    def _candidates(self, name: str, salt: str | None) -> list[str]:
        path = self.name_path(name, salt)
        with files.in_words(f"reading {path}"):
            try:
                fd = files.open_file(path)
            except FileNotFoundError:
                return []
            with open(fd, "rb") as file:
                return json.loads(files.unseal(path, file.read()))["ids"]

    def owner(self, name: str, salt: str | None) -> Manifest | None:
        """The memory that has a name; None: nobody has.

        Raises:
            Damaged: the file of the name or the memory's manifest is damaged.
        """
        while True:
            ids = self._candidates(name, salt)
            for id in ids:
                manifest = self.read(id)
                if manifest is not None and (manifest.name, manifest.salt) == (name, salt):
                    return manifest
            # the one may have been moved and the other deleted while we looked
            if ids == self._candidates(name, salt):
                return None

    def has_its_name(self, manifest: Manifest) -> bool:
        """Does the name that the memory took still lead to it? Where that can't be read, it counts as its name."""
        if manifest.name is None:
            return False
        try:
            owner = self.owner(manifest.name, manifest.salt)
        except Damaged:
            return True
        return owner is not None and owner.id == manifest.id

    def describe(self, manifest: Manifest) -> Manifest:
        """What `read` gave, as callers see it: status, name and progress as they are now."""
        fields: dict[str, object] = {}
        if manifest.name is not None and not self.has_its_name(manifest):
            fields["name"] = None
        alive = False
        if manifest.status == "in_progress":
            fields["progress"] = progress = self._progress(manifest.id)
            alive = progress is not None
            if not alive:
                fields |= {"status": "failed", "error": "The server that was reading it has ended."}
        if not alive and manifest.expires_at is not None and manifest.expires_at <= self._clock():
            fields["status"] = "expired"
        return manifest.model_copy(update=fields) if fields else manifest

    # building -------------------------------------------------------------------------------------------------------

    def build_path(self, id: str) -> Path:
        return self.builds / id

    def start_build(self, id: str, total: int) -> int:
        """The locked file of a new build, whose lock says that its builder lives; gives its descriptor."""
        fd = files.open_file(self.build_path(id), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self.note_progress(fd, 0, total)
        return fd

    @staticmethod
    def note_progress(fd: int, read: int, total: int) -> None:
        os.pwrite(fd, _PROGRESS.pack(read, total), 0)

    def end_build(self, id: str, fd: int) -> None:
        self.build_path(id).unlink(missing_ok=True)
        files.unlock(fd)

    def _progress(self, id: str) -> tuple[int, int] | None:
        """Tokens read and to be read; None: its builder is gone."""
        with files.in_words("asking for the progress of a build"):
            try:
                fd = files.open_file(self.build_path(id))
            except FileNotFoundError:
                return None
            try:
                if files.try_lock(fd, fcntl.LOCK_SH):
                    return None
                data = os.pread(fd, _PROGRESS.size, 0)
                return _PROGRESS.unpack(data) if len(data) == _PROGRESS.size else (0, 0)
            finally:
                os.close(fd)

    # changing -------------------------------------------------------------------------------------------------------

    def touch(self, manifest: Manifest) -> None:
        """Note a use. Takes no lock, and changes nothing that a manifest says."""
        now = round(self._clock() * 1e9)
        try:
            os.utime(self.path(manifest.id), ns=(now, now), follow_symlinks=False)
        except OSError as error:
            # a folder that can only be read is good to read from; who evicts from it sees no use of ours
            if not isinstance(error, FileNotFoundError):
                logger.debug("The use of %s could not be noted: %s", manifest.id, os.strerror(error.errno or 0))

    def commit(self, new: Manifest, heir_of: str | None = None) -> Manifest:
        """Locked: write a manifest, taking a name that it bears and didn't bear; gives it as `describe` does.

        Args:
            heir_of: id of the memory that must have the name now. Without it the name must be free: of a memory that
                failed or expired it is.

        Raises:
            Conflict: another memory has the name.
        """
        old = self.read(new.id)
        before = old.name if old is not None else None
        owner = None
        moves = new.name is not None and (new.name != before or self._retake(new))
        with files.in_words(f"writing the manifest of {new.id}"):
            if before is not None and before != new.name:
                self._settle(before, new.salt)
            if moves and new.name is not None:
                owner = self._settle(new.name, new.salt)
                self.check_free(new, owner, heir_of)
                self._point(new.name, new.salt, [new.id] if owner is None else [new.id, owner.id])
            self._write(new)
            self._after_commit(new, before, owner if moves else None)
        committed = self.read(new.id)
        assert committed is not None, "manifests are removed under the lock only"
        return self.describe(committed)

    def _retake(self, new: Manifest) -> bool:
        """Is a name that the manifest bears not its own any more, or its file damaged?"""
        assert new.name is not None
        try:
            owner = self.owner(new.name, new.salt)
        except Damaged:
            # asked for by id, so that nothing is guessed
            self.name_path(new.name, new.salt).unlink(missing_ok=True)
            return True
        return owner is None or owner.id != new.id

    def check_free(self, new: Manifest, owner: Manifest | None, heir_of: str | None = None) -> None:
        """Raises: Conflict: `owner` has the name of `new` and keeps it, or is not the one whose heir that is."""
        if heir_of is not None:
            if owner is None or owner.id != heir_of:
                now = "is gone" if owner is None else f"leads to {owner.id} now"
                raise Conflict(
                    f"Somebody was faster: the name {new.name!r} {now}, no longer to {heir_of}. Append to that.",
                    None if owner is None else owner.id,
                )
        elif owner is not None and owner.id != new.id and self.describe(owner).status in ("completed", "in_progress"):
            raise Conflict(
                f"The name {new.name!r} is taken by {owner.id}. Delete that, append to it, or choose another.", owner.id
            )

    def _after_commit(self, new: Manifest, before: str | None, previous_owner: Manifest | None) -> None:
        """Tidy up what a committed change has made stale. What fails here, the next change of the name repairs."""
        try:
            if previous_owner is not None and new.name is not None:
                self._point(new.name, new.salt, [new.id])
            if before is not None and before != new.name and self._candidates(before, new.salt)[:1] == [new.id]:
                self.name_path(before, new.salt).unlink(missing_ok=True)
        except (OSError, MemoriesError):
            logger.warning("The names of %s could not be tidied after a change, which is saved.", new.id, exc_info=True)

    def remove(self, manifest: Manifest) -> None:
        """Locked: delete a memory's manifest, and its name with it."""
        with files.in_words(f"deleting {manifest.id}"):
            owned = None
            if manifest.name is not None:
                # the file of a name that can't be read is left to `verify`: it may be another memory's
                with suppress(Damaged):
                    owner = self._settle(manifest.name, manifest.salt)
                    if owner is not None and owner.id == manifest.id:
                        owned = self.name_path(manifest.name, manifest.salt)
            # the commit; a name that leads nowhere is free
            self.path(manifest.id).unlink(missing_ok=True)
            files.sync_folder(self.memories)
            if owned is not None:
                owned.unlink(missing_ok=True)

    def _settle(self, name: str, salt: str | None) -> Manifest | None:
        """Let a name lead to its owner alone, so that no other gets it back when the owner leaves; gives the owner."""
        owner = self.owner(name, salt)
        ids = [] if owner is None else [owner.id]
        if owner is not None and self._candidates(name, salt) != ids:
            self._point(name, salt, ids)
        return owner

    def _point(self, name: str, salt: str | None, ids: list[str]) -> None:
        body = json.dumps({"name": name, "ids": ids}).encode()
        with files.new_file(self.name_path(name, salt), time.time_ns()) as fd:
            files.write_all(fd, files.seal(body))

    def _write(self, manifest: Manifest) -> None:
        """The commit. The time of last use goes with it, also of a use in between."""
        path = self.path(manifest.id)
        used = round((manifest.last_used_at or manifest.created_at) * 1e9)
        with ExitStack() as stack:
            old = None
            with suppress(FileNotFoundError):
                old = files.open_file(path)
                stack.callback(os.close, old)
            with files.new_file(path, used) as fd:
                files.write_all(fd, files.seal(manifest.model_dump_json().encode()))
            if old is not None and (later := os.fstat(old).st_mtime_ns) > used:
                os.utime(path, ns=(later, later), follow_symlinks=False)
