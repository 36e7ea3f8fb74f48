"""Bodies of requests: bounded while they come, files of them on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vllm_armt.memories.errors import InvalidInput, TooLarge

JSON_BYTES = 16 << 20
"""Of a JSON body, which is in memory as a whole."""
SPOOL_BYTES = 1 << 20
"""Of an uploaded file, up to which it is not written to disk."""


async def bounded(request: Request, limit: int, hint: str) -> AsyncIterator[bytes]:
    """The body of a request, as it comes.

    Raises:
        TooLarge: it has more than `limit` bytes; nothing more of it is read.
    """
    error = TooLarge(f"The request has more than {limit} bytes, the most that are allowed. {hint}")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise error
    received = 0
    async for part in request.stream():
        received += len(part)
        if received > limit:
            raise error
        yield part


async def read_json(request: Request, limit: int) -> bytes:
    """Raises: TooLarge."""
    hint = "Send a long text as a file, in a form (multipart/form-data)."
    return b"".join([part async for part in bounded(request, min(limit, JSON_BYTES), hint)])


async def read_form(request: Request, limit: int) -> tuple[BinaryIO, dict[str, str]]:
    """A form with one file, which is on disk if it is not small, and the other fields. The caller closes the file.

    Raises:
        TooLarge: it has more than `limit` bytes.
        InvalidInput: it is no such form.
    """
    parser = MultiPartParser(request.headers, bounded(request, limit, _OPTION), max_files=1, max_fields=64)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidInput(f"The form can't be read: {error.message}") from None
    fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    file = form.get("file")
    if not isinstance(file, UploadFile):
        await form.close()
        raise InvalidInput("The form has no file in the field 'file'.")
    return cast(BinaryIO, file.file), fields


async def read_file(request: Request, limit: int) -> BinaryIO:
    """The body as a file, on disk if it is not small. The caller closes it.

    Raises:
        TooLarge: it has more than `limit` bytes.
    """
    with ExitStack() as opened:
        file = opened.enter_context(SpooledTemporaryFile(SPOOL_BYTES))
        async for part in bounded(request, limit, _OPTION):
            await run_in_threadpool(file.write, part)
        file.seek(0)
        opened.pop_all()
    return cast(BinaryIO, file)


_OPTION = 'Start the server with a larger additional_config["armt"]["memories_max_upload_bytes"] to allow more.'
