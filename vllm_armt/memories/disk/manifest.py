"""What is known of a memory: where in its text it stands, whose it is, and what it may be called."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_armt.memories.errors import InvalidInput

FORMAT = 1
ID = r"mem_[0-9a-f]{32}"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
DIGEST = r"[0-9a-f]{64}"
TEN_YEARS = 10 * 365 * 24 * 3600

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Roles = tuple[Annotated[str, Field(max_length=64)], ...]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
Facts = Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64)]
Status = Literal["in_progress", "completed", "failed", "expired"]


class Keep(Enum):
    """`KEEP` stands for "as it is"."""

    KEEP = "keep"


KEEP = Keep.KEEP


def is_id(reference: str) -> bool:
    """Is it the id of a memory, not a name?

    Raises:
        InvalidInput: it can be neither, so it may not become part of a path.
    """
    if reference.startswith("mem_"):
        if not re.fullmatch(ID, reference):
            raise InvalidInput(f"{reference!r} is no id of a memory: 'mem_' and 32 hexadecimal digits.")
        return True
    check_name(reference)
    return False


def check_name(name: str) -> str:
    """Give back a name that a memory may have.

    Raises:
        InvalidInput: it has other characters, is too long, or looks like an id.
    """
    if not re.fullmatch(NAME, name) or ".." in name or name.startswith("mem_"):
        raise InvalidInput(
            f"{name[:200]!r} can't be the name of a memory. Allowed are 1 to 128 characters, the first a letter or"
            " digit, the others letters, digits, '.', '_' and '-' (ASCII), without '..' and not beginning with 'mem_'."
        )
    return name


def new_id() -> str:
    return f"mem_{secrets.token_hex(16)}"


def salt_digest(salt: str | None) -> str | None:
    """SHA-256 of a `cache_salt` as hex, None for none: all that is kept of a salt.

    Raises:
        InvalidInput: it is empty.
    """
    if salt is None:
        return None
    if not salt:
        raise InvalidInput("The cache_salt is empty; leave it out, or give at least one character.")
    return hashlib.sha256(b"vllm-armt cache_salt\0" + salt.encode()).hexdigest()


def root(salt: str | None) -> str | None:
    """The `content` of a text of which nothing is read yet: as in vLLM's cache, texts of two salts share no page."""
    digest = salt_digest(salt)
    return None if digest is None else hashlib.sha256(b"vllm-armt root\0" + bytes.fromhex(digest)).hexdigest()


def chain(previous: str | None, ids: Sequence[int] | np.ndarray) -> str:
    """The `content` after one more closed segment.

    Args:
        previous: the content before it; for the first segment `root(salt)`, which is None without a salt.
        ids: the segment's S token ids.

    Returns:
        64 hexadecimal digits, SHA-256 of the previous content and the ids: it names the page that the segment left.
    """
    before = bytes(32) if previous is None else bytes.fromhex(previous)
    return hashlib.sha256(before + np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


class Boundary(BaseModel):
    """Where in a text a memory stands.

    Attributes:
        content: hash of all closed segments (`chain`); `root(salt)` while there is none.
        segments: number of closed segments.
        last: the S token ids of the last closed segment, empty if there is none.
        pending: the token ids after it: at most S, but for an answer that generation policy "open" wrote into a segment
            without end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    content: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    segments: int = Field(default=0, ge=0, lt=2**53)
    last: tuple[TokenId, ...] = Field(default=(), repr=False)
    pending: tuple[TokenId, ...] = Field(default=(), repr=False)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool(self.segments) != bool(self.last):
            raise ValueError("`last` must hold the ids of the last closed segment, and nothing if there is none")
        if self.segments and self.content is None:
            raise ValueError("closed segments need a `content`")
        return self

    @property
    def page(self) -> str | None:
        """Key of the page that holds the memory's state; None if no segment is closed and there is no page."""
        return self.content if self.segments else None

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return self.segments * len(self.last) + len(self.pending)

    @classmethod
    def start(cls, salt: str | None = None) -> Boundary:
        """Before a text, for a caller with this `cache_salt`."""
        return Boundary(content=root(salt))

    def read(self, ids: Sequence[int], closed: int, segment_size: int) -> Boundary:
        """The boundary after more text.

        Args:
            ids: the token ids of `last + pending + what is new`, as they stand in the prompt of a request.
            closed: how many of these lie in closed segments: a multiple of `segment_size`, and at least `len(last)`.
            segment_size: S.

        Raises:
            ValueError: `ids` do not begin with `last + pending`, or `closed` is none of such segments.
        """
        known = self.last + self.pending
        if tuple(ids[: len(known)]) != known:
            raise ValueError("The ids do not begin with those that the memory ends with.")
        if closed % segment_size or not len(self.last) <= closed <= len(ids):
            raise ValueError(f"{closed} of {len(ids)} tokens can't be those of closed segments of {segment_size}.")
        content = self.content
        for begin in range(len(self.last), closed, segment_size):
            content = chain(content, ids[begin : begin + segment_size])
        return Boundary(
            content=content,
            segments=self.segments + (closed - len(self.last)) // segment_size,
            last=tuple(ids[max(closed - segment_size, 0) : closed]),
            pending=tuple(ids[closed:]),
        )


class ExpiresAfter(BaseModel):
    """When a memory expires: `seconds` (1 to ten years) after it was made or last used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    anchor: Literal["created_at", "last_used_at"]
    seconds: int = Field(ge=1, le=TEN_YEARS)


class Manifest(Boundary):
    """A memory, as the store's methods give it; frozen, a snapshot.

    Attributes:
        id: "mem_" and 32 hexadecimal digits.
        fingerprint: the store's.
        salt: `salt_digest` of its tenant's cache_salt.
        status: "in_progress" while its builder lives, "completed", "failed" (see `error`), or "expired".
        name: the name that leads to it. On disk, the one that it took; whether it still has it, the name's file says.
        parent: id of the memory that it continues.
        inherits: of an append in progress: the name that moves from its parent to it when it completes.
        roles: of a memory made of messages: the role of each.
        created_at, last_used_at: seconds since the epoch. The second is the file's time of modification, so that noting
            a use writes no file and can't undo a change.
        expires_after: None: never.
        metadata: at most 16 pairs; keys up to 64 characters, values up to 512.
        bytes: size of its page's file; equal texts share one.
        model: name of the model that read it, for people; `fingerprint` decides.
        identity: what the fingerprint is a hash of, so that a refusal can name what differs.
        versions: of the software that made it.
        error: why it failed.
        progress: tokens read and to be read, of a memory in progress.
    """

    format: Literal[1] = 1
    id: str = Field(pattern=f"^{ID}$")
    fingerprint: str
    salt: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    status: Status = "completed"
    name: str | None = Field(default=None, pattern=f"^{NAME}$")
    parent: str | None = Field(default=None, pattern=f"^{ID}$")
    inherits: str | None = Field(default=None, pattern=f"^{NAME}$")
    roles: Roles = ()
    created_at: float = Field(ge=0, allow_inf_nan=False)
    last_used_at: float = Field(default=0.0, exclude=True)
    expires_after: ExpiresAfter | None = None
    metadata: Metadata = Field(default_factory=dict)
    bytes: int = Field(default=0, ge=0)
    model: str = ""
    identity: Facts = Field(default_factory=dict)
    versions: Facts = Field(default_factory=dict)
    error: str | None = Field(default=None, max_length=1000)
    progress: tuple[int, int] | None = Field(default=None, exclude=True)

    @property
    def expires_at(self) -> float | None:
        """Seconds since the epoch."""
        if self.expires_after is None:
            return None
        return getattr(self, self.expires_after.anchor) + self.expires_after.seconds

    @property
    def boundary(self) -> Boundary:
        return Boundary(content=self.content, segments=self.segments, last=self.last, pending=self.pending)

    def change(self, **fields: Any) -> Manifest:
        """A checked copy with other fields.

        Raises:
            InvalidInput: a value is not allowed.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        try:
            return Manifest(**values | fields)
        except ValidationError as error:
            raise InvalidInput(f"Not allowed for a memory: {explain(error)}.") from None


@dataclass(frozen=True)
class Model:
    """Whose memories they are.

    Attributes:
        fingerprint: decides; computed elsewhere of all that a page depends on. 1 to 128 letters, digits, "_" and "-".
        name: for people.
        identity: what the fingerprint is a hash of, so that a memory of another model is refused with what differs.
        versions: of the software, noted in manifests.

    Raises:
        InvalidInput: the fingerprint can't be a folder's name.
    """

    fingerprint: str
    name: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", self.fingerprint):
            raise InvalidInput(f"{self.fingerprint[:200]!r} is no fingerprint: 1 to 128 letters, digits, '_' and '-'.")

    def differences(self, other: Manifest) -> str:
        """What differs between this model and that of a memory, in words."""
        ours, theirs = {"model": self.name, **self.identity}, {"model": other.model, **other.identity}
        differ = [
            f"{key} is {theirs.get(key, 'not stated')!r} there, {ours.get(key, 'not stated')!r} here"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]
        return "; ".join(differ or [f"its fingerprint is {other.fingerprint}, this one's is {self.fingerprint}"])


def explain(error: ValidationError) -> str:
    """What is wrong, without the values: token ids and texts belong in no message."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}" for fault in faults[:4])
