"""What can go wrong with a memory, each with the HTTP status that says so."""

from __future__ import annotations


class MemoriesError(Exception):
    """Base of all errors of the store; `str(error)` is one sentence or two for the person who asked.

    Attributes:
        status: the HTTP status to answer with.
    """

    status = 500


class InvalidInput(MemoriesError):
    """A name, id, salt, metadata, expiry or archive that can't be taken, whatever the store holds."""

    status = 400


class NotFound(MemoriesError):
    """No such memory, or one of another salt: which of the two is never said."""

    status = 404


class Conflict(MemoriesError):
    """The name is taken or has moved on, or the memory isn't (or is no longer) what the request needs it to be.

    Attributes:
        current: id of the memory that stands in the way, if there is one.
    """

    status = 409

    def __init__(self, message: str, current: str | None = None) -> None:
        super().__init__(message)
        self.current = current


class WrongModel(Conflict):
    """The memory or page is of another model, dtype or layout; the message names what differs."""


class Expired(MemoriesError):
    """The memory's time is over; it is still on disk until the next `gc`."""

    status = 410


class TooLarge(MemoriesError):
    """More bytes than an option allows, counting only what may be evicted for them."""

    status = 413


class Damaged(MemoriesError):
    """A file isn't what was written: its checksum, its form, or the place it stands in."""


class Missing(Damaged):
    """The page of a memory is gone."""


class StorageFailed(MemoriesError):
    """The operating system refused: a folder that can't be written, an I/O error, a lock that stays taken."""


class StorageFull(StorageFailed):
    """No room on the disk, or in its quota."""

    status = 507
