"""Files that are whole or not there, locks between processes, and operating-system errors in plain words.

Every file is written under a temporary name in its own folder, brought to the disk, and then renamed: a reader finds
the old file or the new one. Nothing is opened through a symbolic link. Files are 0600, folders 0700.

Locks are `flock`: they belong to an open file, so they hold between threads as between processes, and end with their
process however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_armt.memories.errors import Damaged, StorageFailed, StorageFull

TEMPORARY = ".tmp"
LOCK_TIMEOUT = 60.0
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_SEAL = b'{"sha256":"%s","body":'


@contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageFailed that says what was being done."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"No room on the disk while {doing}: {reason}. Nothing that was saved is lost."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageFailed(f"Not permitted while {doing}: {reason}. The folder must be writable.") from error
        raise StorageFailed(f"The disk failed while {doing}: {reason}.") from error


def make_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter, unless it is there.

    Raises:
        StorageFailed: it can't be made, or something else (a symbolic link, for instance) has its place.
    """
    with in_words(f"making the folder {path}"):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise StorageFailed(f"{path} is no folder. Links are not followed; remove it or choose another folder.")
    return path


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, and nothing that pretends to be one; gives a file descriptor.

    Raises:
        FileNotFoundError: it isn't there.
        Damaged: it is a link or no regular file.
    """
    try:
        fd = os.open(path, flags | _SAFE, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise Damaged(f"{path} is no regular file.") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(f"{path} is no regular file.")
    return fd


def write_all(fd: int, data: Any) -> None:
    """Write a whole buffer at the file's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_file(path: Path, mtime_ns: int) -> Iterator[int]:
    """A descriptor of a temporary file, locked while it is written, that becomes `path` when the block ends well.

    Whoever can lock a temporary file knows that its writer is gone (`remove_if_unlocked`).

    Args:
        mtime_ns: the time of last modification that the file gets.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    fd = open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
        os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        unlock(fd)
    sync_folder(path.parent)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock a file for who wants to remove it; gives whether it is there and nobody else has locked it."""
    try:
        # some file systems lock exclusively only what is open for writing
        fd = open_file(path, os.O_RDWR)
    except (FileNotFoundError, Damaged):
        # what is no regular file is left for `verify` to report
        yield False
        return
    try:
        yield try_lock(fd, fcntl.LOCK_EX)
    finally:
        unlock(fd)


def remove_if_unlocked(path: Path) -> bool:
    """Remove a file that nobody has locked; gives whether it was removed."""
    with claimed(path) as free:
        if free:
            path.unlink(missing_ok=True)
        return free


def try_lock(fd: int, kind: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) if it is free; gives whether it was."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Let go of a file's lock and close it."""
    # a forked child may have inherited the descriptor: closing ours alone would not unlock
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder's lock, made if need be. For moments: never while the bytes of a page are written. Not re-entrant.

    Raises:
        StorageFailed: the folder can't be written, or somebody has held the lock for a minute.
    """
    with in_words(f"locking {path}"):
        fd = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        deadline, wait = time.monotonic() + LOCK_TIMEOUT, 0.0002
        while not try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise StorageFailed(f"{path} has been locked for {LOCK_TIMEOUT:.0f} s: a process that holds it hangs.")
            time.sleep(wait)
            wait = min(2 * wait, 0.01)
        yield
    finally:
        unlock(fd)


def seal(body: bytes) -> bytes:
    """A JSON file that holds the JSON value `body` and its checksum."""
    return _SEAL % hashlib.sha256(body).hexdigest().encode() + body + b"}\n"


def unseal(path: Path, data: bytes) -> bytes:
    """The body of a sealed file, as it was written.

    Raises:
        Damaged: anything differs from what was written.
    """
    start = len(_SEAL) - len("%s") + 64
    body = data[start:-2]
    if seal(body) != data:
        raise Damaged(f"{path} is damaged: its checksum does not fit what it holds.")
    return body
