"""What answers say of memories: the engine's report, in every response and stream, and its refusals as HTTP's."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from vllm import RequestOutput
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError

from vllm_armt.memories.disk.manifest import Manifest


@dataclass
class Answer:
    """To one HTTP request.

    Attributes:
        memory: that it goes on from.
        report: the engine's, once it has come; see the package.
    """

    memory: Manifest | None = None
    report: dict[str, Any] | None = None


ANSWER: ContextVar[Answer | None] = ContextVar("armt_answer", default=None)
"""Of the request that is being handled, if it asks something of memories."""


def watch(engine: EngineClient) -> None:
    """Let answers that have to do with memories say so, and those that are refused raise `GracefulHTTPError`.

    vLLM's handlers would tell a client no more of a refusal than "Internal server error".
    """
    generate = engine.generate

    def watched(prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncGenerator[RequestOutput, None]:
        outputs = generate(prompt, sampling_params, request_id, **more)
        asked = getattr(sampling_params, "extra_args", None) or {}
        if asked.get("memory") is None and asked.get("save_memory") is None:
            return outputs
        return _reported(outputs, ANSWER.get() or Answer())

    engine.generate = watched  # type: ignore[method-assign]


async def _reported(
    outputs: AsyncGenerator[RequestOutput, None], answer: Answer
) -> AsyncGenerator[RequestOutput, None]:
    known = answer.memory.tokens if answer.memory is not None else 0
    async with aclosing(outputs):
        async for output in outputs:
            report = (output.kv_transfer_params or {}).get("memory")
            if report is not None:
                answer.report = report
                if "error" in report:
                    raise GracefulHTTPError(report["error"], HTTPStatus(report["status"]))
            # all that was not read again, of which the client has sent only what is behind the memory
            output.num_cached_tokens = (output.num_cached_tokens or 0) + known
            yield output


async def with_report(stream: AsyncIterable[Any], answer: Answer) -> AsyncIterator[Any]:
    """A stream of events whose chunks that end a choice also have `kv_transfer_params`, as responses have."""
    async for event in stream:
        # a quote within a text has a backslash before it
        if answer.report is not None and isinstance(event, str) and '"finish_reason":"' in event:
            chunk = json.loads(event.removeprefix("data: ")) | {"kv_transfer_params": {"memory": answer.report}}
            yield f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
        else:
            yield event
