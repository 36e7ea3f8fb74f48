"""Keeping a store within its bytes, collecting what nobody needs, and reading all of it to find damage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.catalog import Catalog
from vllm_armt.memories.disk.manifest import Manifest
from vllm_armt.memories.disk.pages import Pages
from vllm_armt.memories.disk.tensorfile import Spec
from vllm_armt.memories.errors import Damaged, MemoriesError, Missing, TooLarge, WrongModel

# how long a failed build can be asked for its error
FAILED_SECONDS = 24 * 3600


@dataclass
class Collected:
    """What `gc` removed, as numbers; `bytes` are those of files."""

    expired: int = 0
    failed: int = 0
    pages: int = 0
    names: int = 0
    temporary: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Finding:
    """Something that `verify` found.

    Attributes:
        path: the file.
        memory: id of the memory whose manifest or page it is, if it is known.
        error: what is wrong.
    """

    path: Path
    memory: str | None
    error: MemoriesError


@dataclass
class _Candidate:
    """What goes together: a page and the memories that have it, or one memory without a page."""

    path: Path | None
    memories: list[Manifest] = field(default_factory=list)
    bytes: int = 0
    used: float = 0.0
    named: bool = False
    useless: bool = True

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Unnamed ones go first, of these expired and failed ones, then the one whose last use is longest ago."""
        return self.named, not self.useless, self.used


class Upkeep:
    """Of one model's folder. Several processes may do it at once.

    Args:
        pages: of memories.
        prefix: pages that belong to no memory.
        grace: seconds for which a page that no manifest mentions is left alone: between a page and its manifest lie the
            report of a worker and a step of the engine.
    """

    def __init__(
        self, catalog: Catalog, pages: Pages, prefix: Pages, grace: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.catalog, self.pages, self.prefix, self.grace, self._clock = catalog, pages, prefix, grace, clock

    def usage(self) -> int:
        """Bytes of all manifests and pages, and of pages that are being written."""
        return sum(entry.bytes for entry in self.pages.entries() + self.prefix.entries()) + sum(
            self._manifest_bytes().values()
        )

    def _manifest_bytes(self) -> dict[str, int]:
        sizes = {}
        with files.in_words("adding up what is stored"), os.scandir(self.catalog.memories) as listed:
            for item in listed:
                with suppress(FileNotFoundError):
                    sizes[item.name.removesuffix(".json")] = item.stat(follow_symlinks=False).st_size
        return sizes

    # room -----------------------------------------------------------------------------------------------------------

    def make_room(self, max_bytes: int, needed: int) -> None:
        """Locked: evict until `needed` more bytes keep within `max_bytes`; if that can't be, evict nothing.

        Raises:
            TooLarge: all that is left is named or in use.
        """
        if needed > max_bytes:
            raise TooLarge(f"{needed} bytes are more than max_bytes, {max_bytes}, allows for all memories.")
        excess = self.usage() + needed - max_bytes
        if excess <= 0:
            return
        candidates = sorted(self._candidates(), key=lambda candidate: candidate.order)
        with files.in_words("evicting"):
            if sum(candidate.bytes for candidate in candidates if not self._in_use(candidate)) >= excess:
                for candidate in candidates:
                    excess -= self._evict(candidate)
                    if excess <= 0:
                        return
        raise TooLarge(
            f"{needed} bytes more are {excess} too many for max_bytes, {max_bytes}, even without all that is unnamed or"
            " expired and not in use. Delete memories or raise max_bytes."
        )

    @staticmethod
    def _in_use(candidate: _Candidate) -> bool:
        if candidate.path is None:
            return False
        with files.claimed(candidate.path) as free:
            return not free

    def _evict(self, candidate: _Candidate) -> int:
        """Remove it unless somebody has begun to use it; gives the bytes."""
        with nullcontext(True) if candidate.path is None else files.claimed(candidate.path) as free:
            if not free:
                return 0
            # locked until it is gone, so that nobody begins to use it: who waits for the lock then finds nothing
            for manifest in candidate.memories:
                self.catalog.remove(manifest)
            if candidate.path is not None:
                candidate.path.unlink(missing_ok=True)
        return candidate.bytes

    def _candidates(self) -> list[_Candidate]:
        """What may be evicted if it is not in use."""
        sizes = self._manifest_bytes()
        groups: dict[str, _Candidate] = {}
        kept: set[str] = set()
        for manifest in self.catalog.scan():
            seen = self.catalog.describe(manifest)
            useless = seen.status in ("expired", "failed")
            if seen.status == "in_progress" or (seen.name is not None and not useless):
                kept.add(manifest.page or manifest.id)
                continue
            path = self.pages.path(manifest.page) if manifest.page else None
            group = groups.setdefault(manifest.page or manifest.id, _Candidate(path))
            group.memories.append(manifest)
            group.bytes += sizes.get(manifest.id, 0)
            group.used = max(group.used, manifest.last_used_at)
            group.named |= seen.name is not None
            group.useless &= useless
        for entry in self.pages.entries():
            if entry.key in groups:
                groups[entry.key].bytes += entry.bytes
            elif entry.key is not None and entry.key not in kept and self._is_old(entry.used_ns):
                groups[entry.key] = _Candidate(entry.path, bytes=entry.bytes, used=entry.used_ns / 1e9)
        found = [group for key, group in groups.items() if key not in kept]
        for entry in self.prefix.entries():
            if entry.key is not None:
                found.append(_Candidate(entry.path, bytes=entry.bytes, used=entry.used_ns / 1e9, useless=False))
        return found

    def _is_old(self, used_ns: int) -> bool:
        return self._clock() - used_ns / 1e9 >= self.grace

    # collecting -----------------------------------------------------------------------------------------------------

    def drop(self, manifest: Manifest) -> int:
        """Locked: delete a memory, and its page if no other memory has it; gives the bytes of the page.

        A page that is in use, or that was saved within the grace, perhaps for a manifest to come, is left to `gc`.
        """
        self.catalog.remove(manifest)
        key = manifest.page
        if key is None or any(other.page == key for other in self.catalog.scan()):
            return 0
        with files.in_words("deleting a page"):
            try:
                state = self.pages.path(key).lstat()
            except FileNotFoundError:
                return 0
            if not self._is_old(state.st_mtime_ns) or not self.pages.remove(key):
                return 0
            files.sync_folder(self.pages.directory)
            return state.st_size

    def gc(self) -> Collected:
        """Remove expired memories, builds that failed a day ago, pages and names of no memory, and left-over files.

        While a manifest is damaged, pages without a memory stay: one may be its.
        """
        done = Collected()
        with files.locked(self.catalog.lock), files.in_words("collecting what nobody needs"):
            damaged: list[tuple[str, Damaged]] = []
            referenced = set()
            for manifest in list(self.catalog.scan(damaged)):
                status = self.catalog.describe(manifest).status
                if status == "expired":
                    done.expired += 1
                elif status == "failed" and self._clock() - manifest.last_used_at >= FAILED_SECONDS:
                    done.failed += 1
                else:
                    referenced.add(manifest.page)
                    continue
                done.bytes += self._size(self.catalog.path(manifest.id))
                self.catalog.remove(manifest)
            for entry in [] if damaged else self.pages.entries():
                unknown = entry.key is not None and entry.key not in referenced and self._is_old(entry.used_ns)
                if unknown and files.remove_if_unlocked(entry.path):
                    done.pages += 1
                    done.bytes += entry.bytes
            self._collect_names(done)
            for folder in (self.pages.directory, self.prefix.directory, self.catalog.memories, self.catalog.names):
                for path in list(folder.glob(f".*{files.TEMPORARY}")):
                    size = self._size(path)
                    if files.remove_if_unlocked(path):
                        done.temporary += 1
                        done.bytes += size
            for path in list(self.catalog.builds.iterdir()):
                done.temporary += files.remove_if_unlocked(path)
            files.sync_folder(self.pages.directory)
        return done

    def _collect_names(self, done: Collected) -> None:
        for path, name, salt in list(self._names()):
            with suppress(Damaged):
                if self.catalog.owner(name, salt) is None:
                    path.unlink(missing_ok=True)
                    done.names += 1

    def _names(self) -> Iterator[tuple[Path, str, str | None]]:
        for path in self.catalog.names.glob("*.json"):
            name, _, salt = path.stem.partition("@")
            yield path, name, salt or None

    @staticmethod
    def _size(path: Path) -> int:
        with suppress(FileNotFoundError):
            return path.lstat().st_size
        return 0

    # verifying ------------------------------------------------------------------------------------------------------

    def verify(self, expected: Spec | None = None) -> list[Finding]:
        """Read every manifest, name and page; gives what is damaged or missing. Takes no lock.

        Args:
            expected: dtypes and shapes of the pages, if they are to be checked too.
        """
        by_page: dict[str, str] = {}
        findings = []
        for id in self.catalog.ids():
            try:
                manifest = self.catalog.read(id)
            except Damaged as error:
                findings.append(Finding(self.catalog.path(id), id, error))
                continue
            if manifest is None or manifest.page is None or manifest.status != "completed":
                continue
            by_page[manifest.page] = id
            # deleted meanwhile? The manifest goes before the page
            if manifest.page not in self.pages and self.catalog.path(id).exists():
                path = self.pages.path(manifest.page)
                findings.append(Finding(path, id, Missing(f"The page {path} of {id} is gone.")))
        for path, name, salt in self._names():
            try:
                self.catalog.owner(name, salt)
            except Damaged as error:
                findings.append(Finding(path, None, error))
        for pages in (self.pages, self.prefix):
            for entry in pages.entries():
                if entry.key is not None:
                    try:
                        pages.verify(entry.key, expected)
                    except Missing:
                        # evicted since it was listed; a memory that lacks its page is reported above
                        continue
                    except (Damaged, WrongModel) as error:
                        findings.append(Finding(entry.path, by_page.get(entry.key), error))
        return findings
