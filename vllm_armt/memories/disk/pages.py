"""A folder of pages: the state that closed segments left, each in one file under a key."""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.tensorfile import (
    UNKNOWN,
    Header,
    Spec,
    data_of,
    host_bytes,
    read_header,
    spec_of,
    tensors_of,
)
from vllm_armt.memories.errors import Damaged, InvalidInput, Missing, WrongModel

FORMAT = "1"
SUFFIX = ".safetensors"
KEY = r"[0-9a-f]{16,128}"
CHUNK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A page, or the temporary file of one, as a folder lists it.

    Attributes:
        key: None: a temporary file.
        used_ns: when it was last saved or, in a folder that notes it, used; nanoseconds since the epoch.
    """

    key: str | None
    path: Path
    bytes: int
    used_ns: int


class Hold:
    """A page that nobody evicts until `release`, or until this process ends."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._mutex = threading.Lock()

    def release(self) -> None:
        """Let go; a second time does nothing."""
        with self._mutex:
            fd, self._fd = self._fd, None
        if fd is not None:
            files.unlock(fd)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Pages:
    """Pages of one model in a folder. Thread-safe; several processes may use one folder.

    **In use.** A page that is being read can't be lost: the file is open, and removing its name does not take its
    bytes. What has to be guarded is the time between a look-up and the load, which may be in another process: `hold`
    keeps a shared lock on the file, and nothing evicts a file that it can't lock for itself. The lock ends with its
    process.

    Args:
        directory: the folder, which exists.
        fingerprint: of the model; part of every page, so that a page put under another model's folder is found out.
        lock: file of the lock that guards what the folder holds.
        make_room: called with the lock held and a number of bytes, before as many are written.
        notes_use: whether loading a page counts as a use of it (`Entry.used_ns`).
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        lock: Path,
        make_room: Callable[[int], None],
        *,
        notes_use: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self._lock, self._make_room, self._notes_use, self._clock = lock, make_room, notes_use, clock

    def path(self, key: str) -> Path:
        """Raises: InvalidInput: the key is not 16 to 128 hexadecimal digits."""
        if not re.fullmatch(KEY, key):
            raise InvalidInput("The key of a page is 16 to 128 hexadecimal digits (0-9, a-f).")
        return self.directory / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self.bytes_of(key) is not None

    def bytes_of(self, key: str) -> int | None:
        """Size of a page's file, None if there is none. Nothing of it is read."""
        with files.in_words("looking for a page"), suppress(FileNotFoundError, Damaged):
            fd = files.open_file(self.path(key))
            try:
                return os.fstat(fd).st_size
            finally:
                os.close(fd)
        return None

    # writing --------------------------------------------------------------------------------------------------------

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> int:
        """Write a page, complete and on the disk when this returns; gives its file's size in bytes.

        A page that is there and whole is not written again, since a key stands for one text; a damaged one is replaced.
        Takes as long as the disk does, so call it from a thread of its own. Needs no second copy of the page in RAM;
        tensors that lie on a device or are not contiguous are copied one at a time.

        Args:
            key: `Boundary.page`, or of the second tier a block hash as hex.
            tensors: all of one page, of any number of layers; they may share one buffer, but may not change meanwhile.

        Raises:
            TooLarge: `max_bytes` has no room for it, even with all that may be evicted gone.
            StorageFull, StorageFailed: it could not be written; nothing of it stays.
        """
        header = self._header(key, spec_of(tensors))
        size = len(header.encode()) + header.data_bytes
        if self._is_whole(key, header) and self._touch(key):
            return size
        return self.write(key, header, data_of(header, tensors))

    def _header(self, key: str, spec: Spec) -> Header:
        self.path(key)
        return Header.of(spec, {"format": FORMAT, "fingerprint": self.fingerprint, "key": key, "sha256": UNKNOWN})

    def _is_whole(self, key: str, header: Header) -> bool:
        """Is there this page, with these tensors, and undamaged?"""
        try:
            with self._open(key) as (file, there):
                return there.spec == header.spec and self._digest(file, there, None) == there.metadata["sha256"]
        except Damaged:
            return False

    def _touch(self, key: str) -> bool:
        """Note that a page was saved or used just now; gives whether it was still there."""
        now = round(self._clock() * 1e9)
        # under the lock: who removes pages looks at this time with the lock held
        with files.locked(self._lock), files.in_words("noting the use of a page"):
            try:
                os.utime(self.path(key), ns=(now, now), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def write(self, key: str, spec: Header | Spec, data: Iterable[memoryview | bytes]) -> int:
        """Write a page from its bytes in the file's order; gives the file's size. Replaces one that is there.

        Raises:
            Damaged: `data` has more or fewer bytes than the header says.
            TooLarge, StorageFull, StorageFailed: as `save`.
        """
        header = self._header(key, spec.spec if isinstance(spec, Header) else spec)
        begin = len(header.encode())
        total = begin + header.data_bytes
        digest, end = header.digest(), begin
        with files.in_words(f"writing a page of {total} bytes to {self.directory}"), ExitStack() as stack:
            with files.locked(self._lock):
                self._make_room(total)
                # made under the lock, so that nobody takes it for a left-over before its writer has locked it; at full
                # length, so that other writers count it
                fd = stack.enter_context(files.new_file(self.path(key), round(self._clock() * 1e9)))
                os.ftruncate(fd, total)
            os.lseek(fd, begin, os.SEEK_SET)
            for part in data:
                end += len(part)
                if end > total:
                    break
                digest.update(part)
                files.write_all(fd, part)
            if end != total:
                raise Damaged(
                    f"The data of a page are {end - begin} bytes or more; its header says {header.data_bytes}."
                )
            os.lseek(fd, 0, os.SEEK_SET)
            files.write_all(fd, header.with_metadata(sha256=digest.hexdigest()).encode())
        return total

    # reading --------------------------------------------------------------------------------------------------------

    def load(self, key: str, expected: Spec) -> dict[str, torch.Tensor]:
        """Read a page and check it whole; gives CPU tensors, views of one buffer that is theirs alone.

        The file is read, not mapped: every byte is hashed anyway, what was hashed is then what is used, and a file that
        is cut meanwhile is an error instead of the end of the process.

        Args:
            expected: dtype and shape of every tensor.

        Raises:
            Missing: there is no such page.
            WrongModel: it holds other tensors than expected; the first that differ are named.
            Damaged: it is not as it was written.
        """
        with self._open(key) as (file, header):
            self.check_spec(str(self.path(key)), header.spec, expected)
            data = torch.empty(header.data_bytes, dtype=torch.uint8)
            if self._digest(file, header, host_bytes(data)) != header.metadata["sha256"]:
                raise Damaged(f"{self.path(key)} is damaged: its checksum does not fit what it holds.")
        if self._notes_use:
            with suppress(OSError):
                # of no consequence where the folder is read-only: who evicts from it notes uses of its own
                now = round(self._clock() * 1e9)
                os.utime(self.path(key), ns=(now, now), follow_symlinks=False)
        return tensors_of(header, data)

    def verify(self, key: str, expected: Spec | None = None) -> None:
        """Read a page and check it, without keeping it.

        Raises:
            Missing, WrongModel, Damaged: as `load`.
        """
        with self.reading(key, expected):
            pass

    @contextmanager
    def reading(self, key: str, expected: Spec | None = None) -> Iterator[tuple[BinaryIO, Header]]:
        """A page that was checked whole, open at its data, for who copies it. Raises: as `load`."""
        with self._open(key) as (file, header):
            if expected is not None:
                self.check_spec(str(self.path(key)), header.spec, expected)
            begin = file.tell()
            if self._digest(file, header, None) != header.metadata["sha256"]:
                raise Damaged(f"{self.path(key)} is damaged: its checksum does not fit what it holds.")
            file.seek(begin)
            yield file, header

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, Header]]:
        """A page's file at its data, with its header; length and place are checked, the data are not."""
        path = self.path(key)
        with files.in_words(f"reading {path}"):
            try:
                fd = files.open_file(path)
            except FileNotFoundError:
                raise Missing(f"The page {path} is gone.") from None
            with open(fd, "rb", buffering=0) as file:
                header = read_header(file.read, str(path))
                stated = header.metadata
                if (stated.get("format"), stated.get("key")) != (FORMAT, key) or "sha256" not in stated:
                    raise Damaged(f"{path} is damaged: it is another page, or of another format than {FORMAT}.")
                if stated.get("fingerprint") != self.fingerprint:
                    raise WrongModel(
                        f"{path} is a page of another model: its fingerprint is {stated.get('fingerprint')}, this"
                        f" model's is {self.fingerprint}."
                    )
                size, wanted = os.fstat(fd).st_size, file.tell() + header.data_bytes
                if size != wanted:
                    raise Damaged(f"{path} is damaged: it has {size} bytes instead of {wanted}.")
                yield file, header

    @staticmethod
    def _digest(file: BinaryIO, header: Header, into: memoryview | None) -> str:
        """Checksum of the header and of the data that follow; these are kept in `into`, if given."""
        digest, done = header.digest(), 0
        scratch = memoryview(bytearray(min(CHUNK, header.data_bytes))) if into is None else into
        while done < header.data_bytes:
            begin = 0 if into is None else done
            room = scratch[begin : begin + min(CHUNK, header.data_bytes - done)]
            count = file.readinto(room)  # type: ignore[attr-defined]
            if not count:
                break
            digest.update(room[:count])
            done += count
        return digest.hexdigest()

    @staticmethod
    def check_spec(what: str, found: Spec, expected: Spec) -> None:
        """Raises: WrongModel: `what` holds other tensors than expected; the first three that differ are named."""
        differ = [
            f"{name} is {_words(found.get(name))}, expected {_words(expected.get(name))}"
            for name in sorted(found.keys() | expected.keys())
            if _words(found.get(name)) != _words(expected.get(name))
        ]
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise WrongModel(f"{what} has another layout than this model: {'; '.join(differ[:3])}{more}.")

    # keeping and removing -------------------------------------------------------------------------------------------

    def hold(self, key: str) -> Hold:
        """Guard a page against eviction, in all processes, until the hold is released.

        Raises:
            Missing: it is gone.
        """
        path = self.path(key)
        with files.in_words(f"opening {path}"):
            while True:
                try:
                    fd = files.open_file(path)
                except FileNotFoundError:
                    raise Missing(f"The page {path} is gone.") from None
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    # the lock is on the file, which may have lost its name while we waited
                    with suppress(FileNotFoundError):
                        if os.path.samestat(os.fstat(fd), path.lstat()):
                            return Hold(fd)
                except BaseException:
                    os.close(fd)
                    raise
                files.unlock(fd)

    def remove(self, key: str) -> bool:
        """Remove a page unless it is held; gives whether it was removed. Call it with the lock held."""
        return files.remove_if_unlocked(self.path(key))

    def entries(self) -> list[Entry]:
        """All files of the folder."""
        found = []
        with files.in_words(f"listing {self.directory}"), os.scandir(self.directory) as listed:
            for item in listed:
                with suppress(FileNotFoundError):
                    state = item.stat(follow_symlinks=False)
                    key = item.name.removesuffix(SUFFIX) if not item.name.endswith(files.TEMPORARY) else None
                    if key is None or re.fullmatch(KEY, key):
                        found.append(Entry(key, Path(item.path), state.st_size, state.st_mtime_ns))
        return found


def _words(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}".removeprefix("torch.")
