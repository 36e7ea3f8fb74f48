"""A request, and what memories have to do with it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request

from vllm_armt.memories.args import MemoryArgs
from vllm_armt.memories.manifest import Boundary, Manifest
from vllm_armt.memories.prefix_tier import Prefix
from vllm_armt.memories.transfers import Failure


@dataclass(eq=False)
class Session:
    """From a request's arrival to the report of what it saves.

    Attributes:
        request: the scheduler's.
        args: what it asks for; None for an ordinary prompt that the second tier knows.
        start: where its text goes on from.
        memory: that it goes on from.
        salt: the client's cache_salt.
        prefix: what the second tier knows of an ordinary prompt, once it does.
        column: of the block table, where a page is brought to.
        failure: why the request can't go on.
        ticket: of its save, once that was ordered.
        saved: what became of it.
    """

    request: Request
    args: MemoryArgs | None
    start: Boundary
    memory: Manifest | None = None
    salt: str | None = None
    prefix: Future[Prefix] | None = None
    column: int = 0
    failure: Failure | None = None
    ticket: int | None = None
    saved: Manifest | Boundary | Failure | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save was ordered that is not reported yet."""
        return self.ticket is not None and self.saved is None

    @property
    def saves_answer(self) -> bool:
        """Whether what is generated is saved with the prompt."""
        return self.args is not None and self.args.save_memory is not None and self.args.save_memory.after == "answer"

    @property
    def saves_prompt(self) -> bool:
        """Whether the prompt is saved alone."""
        return self.args is not None and self.args.saves and not self.saves_answer

    def info(self) -> dict[str, Any]:
        """What the response says of memories: its `kv_transfer_params`."""
        info: dict[str, Any] = {}
        if self.memory is not None:
            info["used"] = {field: getattr(self.memory, field) for field in ("id", "name", "tokens", "segments")}
        if isinstance(self.saved, Failure):
            info["saved"] = {"error": self.saved.message, "status": self.saved.status}
        elif isinstance(self.saved, Manifest):
            fields = ("id", "name", "parent", "tokens", "segments", "bytes")
            info["saved"] = {field: getattr(self.saved, field) for field in fields}
        elif self.saved is not None:
            info["saved"] = {"boundary": self.saved.model_dump_json()}
        return {"memory": info}
