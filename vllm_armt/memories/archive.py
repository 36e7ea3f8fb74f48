"""One memory as one file: its page with its manifest in the header, a safetensors file like any other.

An imported page gets a key of its own, made of the checksum of its bytes: it is never taken for what this model itself
has read of a text, so no archive can change what another memory answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from vllm_armt.memories import files
from vllm_armt.memories.errors import Damaged, InvalidInput, TooLarge
from vllm_armt.memories.manifest import Manifest, explain, root
from vllm_armt.memories.pages import CHUNK, Pages
from vllm_armt.memories.tensorfile import Header, read_header

FORMAT = "vllm-armt memory 1"


class Archive:
    """A memory to send or to write: iterate once, or close.

    Attributes:
        bytes: length of the whole.
    """

    def __init__(self, memory: Manifest, pages: Pages) -> None:
        """Reads the page and checks it, so that no damaged archive is ever begun.

        Raises:
            Missing, Damaged: as `Pages.load`.
        """
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


class Import:
    """An archive that is being read from a stream, checked as it goes.

    Args:
        file: whose `read(n)` gives at most n bytes.
        limit: bytes that its data may have; nothing beyond a header of at most 16 MiB is read of a larger one.

    Attributes:
        manifest: as it was exported.

    Raises:
        InvalidInput: it is no archive of a memory, or damaged.
        TooLarge: it is larger than `limit`.
    """

    def __init__(self, file: BinaryIO, limit: int | None) -> None:
        self._file = file
        try:
            header = read_header(file.read, "The archive")
            if header.metadata.get("archive") != FORMAT:
                raise Damaged(f"The archive is none of {FORMAT!r}.")
            body = files.unseal(Path("The manifest of the archive"), header.metadata["manifest"].encode())
            self.manifest = Manifest.model_validate_json(body)
        except (Damaged, KeyError) as error:
            raise InvalidInput(f"This can't be imported. {error}") from None
        except ValidationError as error:
            raise InvalidInput(f"This can't be imported. The manifest of the archive: {explain(error)}.") from None
        if limit is not None and header.data_bytes > limit:
            raise TooLarge(f"The archive has {header.data_bytes} bytes of data; at most {limit} are allowed.")
        own = {key: text for key, text in header.metadata.items() if key not in ("archive", "manifest")}
        self.page = Header(header.spec, own)
        if self.manifest.page is not None and own.get("key") != self.manifest.page:
            raise InvalidInput("This can't be imported: its page is not that of its manifest.")

    def key(self, salt: str | None) -> str:
        """The `content` that the memory gets for a tenant."""
        seen = f"{root(salt)} {self.page.metadata.get('sha256')}"
        return hashlib.sha256(b"vllm-armt import\0" + seen.encode()).hexdigest()

    def data(self) -> Iterator[bytes]:
        """The page's bytes; ends well only if they and what stands around them are what was exported.

        Raises:
            InvalidInput: they aren't.
        """
        digest, missing = self.page.digest(), self.page.data_bytes
        while missing:
            part = self._file.read(min(CHUNK, missing))
            if not part:
                raise InvalidInput(f"This can't be imported: it is cut, {missing} bytes are missing.")
            digest.update(part)
            missing -= len(part)
            yield part
        if self._file.read(1):
            raise InvalidInput("This can't be imported: it goes on behind its end.")
        if self.manifest.page is not None and digest.hexdigest() != self.page.metadata.get("sha256"):
            raise InvalidInput("This can't be imported: it is damaged, its checksum does not fit what it holds.")
