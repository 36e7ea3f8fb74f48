"""The routes: `/v1/memories`, the models, and the page; see docs/memories.md."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_armt.memories.args import FIELDS
from vllm_armt.memories.disk.archive import export_memory, import_memory
from vllm_armt.memories.disk.builds import Options
from vllm_armt.memories.disk.manifest import KEEP, Manifest
from vllm_armt.memories.errors import Conflict, InvalidInput, MemoriesError, NotFound
from vllm_armt.memories.http.answers import ANSWER, Answer, with_report
from vllm_armt.memories.http.schemas import Create, Update, Upload, described, new_name, unflattened
from vllm_armt.memories.http.service import Service
from vllm_armt.memories.http.uploads import read_file, read_form, read_json
from vllm_armt.memories.texts import TokenIds, Tokens, file_tokens, text_tokens

PAGE = Path(__file__).with_name("page.html")
# nothing but the page itself and this server
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)

router = APIRouter()
RequestT = TypeVar("RequestT", ChatCompletionRequest, CompletionRequest, ResponsesRequest)
Salt = Query(default=None, alias="cache_salt")


class MemoriesOff(MemoriesError):
    """The server keeps no memories."""

    status = 501


def service_of(request: Request) -> Service:
    """Raises: MemoriesOff."""
    service: Service | None = request.app.state.memories
    if service is None:
        raise MemoriesOff(
            "This server keeps no memories. Start it with "
            """--additional-config '{"armt": {"memories": "DIR"}}', or by vllm-armt serve MODEL --memories DIR."""
        )
    return service


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """A `MemoriesError` as OpenAI's error object."""
    assert isinstance(error, MemoriesError)
    status = HTTPStatus(error.status)
    kind = "".join(status.phrase.title().split()).removesuffix("Error") + "Error"
    response = create_error_response(str(error), kind, status)
    return JSONResponse(response.model_dump(), error.status)


# making ---------------------------------------------------------------------------------------------------------------


@router.post("/v1/memories")
async def create(request: Request, wait: bool = False) -> JSONResponse:
    """Read a text, messages, token ids, or an uploaded file into a memory."""
    return await _make(request, wait, None)


@router.post("/v1/memories/{memory}/append")
async def append(request: Request, memory: str, wait: bool = False) -> JSONResponse:
    """Read more behind a memory: a new one, to which the name moves."""
    return await _make(request, wait, memory)


async def _make(request: Request, wait: bool, reference: str | None) -> JSONResponse:
    service = service_of(request)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        file, fields = await read_form(request, service.max_upload_bytes)
        try:
            upload = Upload.parse(unflattened(fields))
            parent = await _parent(service, upload, reference)
            begin = await asyncio.to_thread(service.beginning, parent)
            tokens: Tokens = await asyncio.to_thread(file_tokens, service.encode, file, begin)
            memory, task = await service.build(tokens, file.close, **_options(upload, parent))
        except BaseException:
            file.close()
            raise
    else:
        await validate_json_request(request)
        body = Create.parse(await read_json(request, service.max_upload_bytes))
        parent = await _parent(service, body, reference)
        options, behind = _options(body, parent), None
        if body.messages is not None:
            behind = service.rendered(body.messages, body.tools, body.chat_template_kwargs)
            tokens, options["roles"] = await asyncio.to_thread(behind, parent)
        elif isinstance(body.input, str):
            begin = await asyncio.to_thread(service.beginning, parent)
            tokens = await asyncio.to_thread(text_tokens, service.encode, body.input, begin)
        else:
            await asyncio.to_thread(service.check_ids, body.input)
            tokens = TokenIds(body.input)
        memory, task = await service.build(tokens, behind=behind, **options)
    if not wait:
        return JSONResponse(described(memory), HTTPStatus.ACCEPTED)
    try:
        # who goes away does not end it
        return JSONResponse(described(await asyncio.shield(task)))
    except asyncio.CancelledError:
        if task.cancelled():
            raise Conflict(f"{memory.id} was deleted while it was being read.", memory.id) from None
        raise


async def _parent(service: Service, body: Upload, reference: str | None) -> Manifest | None:
    """The memory that a text is appended to."""
    if body.model is not None and body.model not in service.names.bases:
        raise NotFound(f"The model {body.model[:200]!r} is not served here; leave it out.")
    if reference is not None:
        return await asyncio.to_thread(service.store.get, reference, salt=body.cache_salt)
    if body.if_parent is not None:
        raise InvalidInput("if_parent is for appending: POST /v1/memories/{memory}/append.")
    return None


def _options(body: Upload, parent: Manifest | None) -> Options:
    options: Options = {**body.options, "name": new_name(body), "parent": parent, "salt": body.cache_salt}
    if body.if_parent is not None:
        options["if_parent"] = body.if_parent
    return options


@router.post("/v1/memories/import")
async def import_(request: Request, name: str | None = None, salt: str | None = Salt) -> JSONResponse:
    """A memory from the file that `/content` gave, as the body."""
    service = service_of(request)
    file = await read_file(request, service.max_upload_bytes)
    with file:
        memory = await service.change(
            import_memory, service.store, file, name=KEEP if name is None else name, salt=salt
        )
    return JSONResponse(described(memory))


# looking up and changing ----------------------------------------------------------------------------------------------


@router.get("/v1/memories")
async def list_(request: Request, after: str | None = None, limit: int = 20, salt: str | None = Salt) -> JSONResponse:
    """A tenant's memories, the newest first."""
    memories, has_more = await asyncio.to_thread(service_of(request).store.list, salt=salt, after=after, limit=limit)
    ends = {"first_id": memories[0].id, "last_id": memories[-1].id} if memories else {"first_id": None, "last_id": None}
    return JSONResponse(
        {"object": "list", "data": [described(memory) for memory in memories], "has_more": has_more, **ends}
    )


@router.get("/v1/memories/{memory}")
async def show(request: Request, memory: str, salt: str | None = Salt) -> JSONResponse:
    """One memory."""
    return JSONResponse(described(await asyncio.to_thread(service_of(request).store.get, memory, salt=salt)))


@router.post("/v1/memories/{memory}")
async def update(request: Request, memory: str) -> JSONResponse:
    """Change a memory's name, metadata or expiry."""
    service = service_of(request)
    await validate_json_request(request)
    body = Update.parse(await read_json(request, service.max_upload_bytes))
    changed = await service.change(service.store.update, memory, salt=body.cache_salt, **body.changes)
    return JSONResponse(described(changed))


@router.delete("/v1/memories/{memory}")
async def delete(request: Request, memory: str, salt: str | None = Salt) -> JSONResponse:
    """Delete a memory; requests that use it are not disturbed."""
    deleted = await service_of(request).delete(memory, salt)
    return JSONResponse({"id": deleted.id, "object": "memory.deleted", "deleted": True})


@router.get("/v1/memories/{memory}/content")
async def content(request: Request, memory: str, salt: str | None = Salt) -> Response:
    """A memory as one file."""
    archive = await asyncio.to_thread(export_memory, service_of(request).store, memory, salt=salt)
    headers = {
        "Content-Length": str(archive.bytes),
        # names hold letters, digits, dots and dashes
        "Content-Disposition": f'attachment; filename="{memory}.safetensors"',
    }
    return StreamingResponse(archive, headers=headers, media_type="application/octet-stream")


# asking ---------------------------------------------------------------------------------------------------------------


@router.get("/v1/models")
async def models(request: Request, salt: str | None = Salt) -> JSONResponse:
    """vLLM's models, and behind them a tenant's memories."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    service: Service | None = request.app.state.memories
    if service is not None:
        base = listed.data[0]
        memories = await asyncio.to_thread(service.completed, salt)
        listed.data += [service.names.card(memory, base) for memory in memories]
    return JSONResponse(listed.model_dump())


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)])
async def create_completion(request: CompletionRequest, raw_request: Request) -> Any:
    """vLLM's completions, of a memory too."""
    return await _answer(completion_router.create_completion, request, raw_request)


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Any:
    """vLLM's chat completions, of a memory too."""
    return await _answer(chat_router.create_chat_completion, request, raw_request)


@router.post("/v1/responses", dependencies=[Depends(validate_json_request)])
async def create_responses(request: ResponsesRequest, raw_request: Request) -> Any:
    """vLLM's responses, of a memory too."""
    return await _answer(responses_router.create_responses, request, raw_request)


async def _answer(
    handler: Callable[[RequestT, Request], Awaitable[Any]], request: RequestT, raw_request: Request
) -> Any:
    """Let vLLM's handler answer, and its stream say of memories what its response would."""
    if raw_request.app.state.memories is not None:
        raw_request.app.state.memories.names.resolve(request)
    if not any((request.vllm_xargs or {}).get(field) is not None for field in FIELDS):
        return await handler(request, raw_request)
    service_of(raw_request)
    answer = Answer()
    ANSWER.set(answer)
    response = await handler(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = with_report(response.body_iterator, answer)
    return response


@router.get("/memories", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page. It holds nothing that is secret, and asks for the key that what it calls may need."""
    service_of(request)
    return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})
