"""One memory as one file: its page with its manifest in the header, a safetensors file like any other.

An imported page gets a key of its own, made of the checksum of its bytes: it is never taken for what this model itself
has read of a text, so no archive can change what another memory answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.builds import Options, draft
from vllm_armt.memories.disk.manifest import KEEP, Keep, Manifest, explain, root
from vllm_armt.memories.disk.pages import CHUNK, Pages
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.disk.tensorfile import Header, Spec, read_header
from vllm_armt.memories.errors import Damaged, InvalidInput, TooLarge, WrongModel

FORMAT = "vllm-armt memory 1"


class Archive:
    """A memory to send or to write: iterate once, or close.

    Attributes:
        bytes: length of the whole.
    """

    def __init__(self, memory: Manifest, pages: Pages) -> None:
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        header = Header.of({}, {"fingerprint": memory.fingerprint})
        if memory.page is not None:
            self._file, header = self._stack.enter_context(pages.reading(memory.page))
        # nothing that tells of the tenant: a digest of a short salt could be guessed
        public = memory.change(salt=None, content=memory.page, parent=None)
        body = public.model_dump_json().encode()
        header = header.with_metadata(archive=FORMAT, manifest=files.seal(body).decode())
        self._begin = header.encode()
        self.bytes = len(self._begin) + header.data_bytes

    def __iter__(self) -> Iterator[bytes]:
        with self._stack:
            yield self._begin
            while self._file is not None and (part := self._file.read(CHUNK)):
                yield part

    def close(self) -> None:
        self._stack.close()


def export_memory(store: Store, reference: str, *, salt: str | None = None) -> Archive:
    """A memory as one file.

    Raises:
        Conflict: it is in progress or failed.
        Missing, Damaged: its page, which is read and checked before this returns: no damaged archive is ever begun.
        InvalidInput, NotFound, WrongModel, Expired: as `Store.get`.
    """
    with store.use(reference, salt=salt) as lease:
        return Archive(lease.memory, store.pages)


@dataclass(frozen=True)
class Beginning:
    """Of an archive: what it says before the state comes.

    Attributes:
        header: of the file.
        memory: as it was exported.
    """

    header: Header
    memory: Manifest


def read_beginning(file: BinaryIO) -> Beginning:
    """What an archive says of itself, for who has yet to find the store that it belongs to.

    Raises:
        InvalidInput: it is no archive, or damaged.
    """
    try:
        header = read_header(file.read, "The archive")
        if header.metadata.get("archive") != FORMAT:
            raise Damaged(f"The archive is none of {FORMAT!r}.")
        body = files.unseal(Path("The manifest of the archive"), header.metadata.get("manifest", "").encode())
        exported = Manifest.model_validate_json(body)
    except Damaged as error:
        raise InvalidInput(f"This can't be imported. {error}") from None
    except ValidationError as error:
        raise InvalidInput(f"This can't be imported. The manifest of the archive: {explain(error)}.") from None
    return Beginning(header, exported)


def import_memory(
    store: Store,
    file: BinaryIO,
    *,
    name: str | Keep | None = KEEP,
    salt: str | None = None,
    expected: Spec | None = None,
    limit: int | None = None,
    beginning: Beginning | None = None,
) -> Manifest:
    """A memory from an exported file, read as a stream and written as it is read. Keeps its id if that is free.

    Args:
        file: with `read(n)`; from its position to its end. Of a refused one no more than the header is read.
        name: `KEEP`: the one that it was exported with.
        expected: dtypes and shapes of this model's pages; others are refused.
        limit: bytes of data that are taken at most.
        beginning: what `read_beginning` has read of the file, if it has.

    Raises:
        InvalidInput: it is no archive, cut, or damaged.
        WrongModel: it is of another model or layout.
        TooLarge: it is larger than `limit`, or than `max_bytes` has room for.
        Conflict: the name is taken.
        StorageFull, StorageFailed: it could not be written; nothing of it stays.
    """
    beginning = beginning or read_beginning(file)
    header, exported = beginning.header, beginning.memory
    own = {key: text for key, text in header.metadata.items() if key not in ("archive", "manifest")}
    page = Header(header.spec, own)
    if exported.fingerprint != store.model.fingerprint:
        raise WrongModel(f"The archive is of another model: {store.model.differences(exported)}.")
    if exported.status != "completed" or own.get("key") != exported.page or (exported.page is None and page.spec):
        raise InvalidInput("This can't be imported: its page is not that of a complete memory.")
    if limit is not None and page.data_bytes > limit:
        raise TooLarge(f"The archive has {page.data_bytes} bytes of data; at most {limit} are allowed.")
    options: Options = {
        "name": exported.name if isinstance(name, Keep) else name,
        "roles": exported.roles,
        "metadata": exported.metadata,
        "expires_after": exported.expires_after,
        "salt": salt,
    }
    build = draft(store.catalog, store.pages, store.model, options, store.clock())
    if build.manifest.name is not None:
        # now too, before much is read for nothing
        store.catalog.check_free(build.manifest, store.catalog.owner(build.manifest.name, build.manifest.salt))
    content, size = root(salt), 0
    data = _checked_data(file, page)
    if exported.page is None:
        # no data; the end must be here
        list(data)
    else:
        if expected is not None:
            store.pages.check_spec("The archive", page.spec, expected)
        seen = f"{root(salt)} {own.get('sha256')}"
        content = hashlib.sha256(b"vllm-armt import\0" + seen.encode()).hexdigest()
        size = store.pages.write(content, page.spec, data)
    with files.locked(store.catalog.lock):
        free = not store.catalog.path(exported.id).exists()
        memory = build.manifest.change(
            **dict(exported.boundary) | {"content": content},
            id=exported.id if free else build.id,
            status="completed",
            versions=exported.versions,
            bytes=size,
        )
        return store.catalog.commit(memory)


def _checked_data(file: BinaryIO, page: Header) -> Iterator[bytes]:
    """A page's bytes; ends well only if they are what was exported, and the last of the file.

    Raises:
        InvalidInput: they aren't.
    """
    digest, missing = page.digest(), page.data_bytes
    while missing:
        part = file.read(min(CHUNK, missing))
        if not part:
            raise InvalidInput(f"This can't be imported: it is cut, {missing} bytes are missing.")
        digest.update(part)
        missing -= len(part)
        yield part
    if file.read(1):
        raise InvalidInput("This can't be imported: it goes on behind its end.")
    if "key" in page.metadata and digest.hexdigest() != page.metadata.get("sha256"):
        raise InvalidInput("This can't be imported: it is damaged, its checksum does not fit what it holds.")
