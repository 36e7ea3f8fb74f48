"""The JSON of `/v1/memories`: what is sent, and a memory as it is shown."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vllm_armt.memories.disk.builds import Options
from vllm_armt.memories.disk.manifest import KEEP, ExpiresAfter, Keep, Manifest, Metadata, explain
from vllm_armt.memories.errors import InvalidInput


class Body(BaseModel):
    """A JSON object with known fields only."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def parse(cls, body: bytes | dict[str, Any]) -> Self:
        """Raises: InvalidInput: it is none of these, said without a word of what was sent."""
        try:
            return cls.model_validate_json(body or b"{}") if isinstance(body, bytes) else cls.model_validate(body)
        except ValidationError as error:
            raise InvalidInput(f"The request is not valid: {explain(error)}.") from None

    @property
    def options(self) -> Options:
        """Those of `builds.Options` that were given."""
        return {field: getattr(self, field) for field in self.model_fields_set & {"metadata", "expires_after"}}  # type: ignore[return-value]


class Update(Body):
    """What `POST /v1/memories/{memory}` changes; null takes a name away, and lets a memory never expire."""

    name: str | None = None
    metadata: Metadata | None = None
    expires_after: ExpiresAfter | None = None
    cache_salt: str | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Arguments of `Store.update`."""
        changes = {field: getattr(self, field) for field in self.model_fields_set - {"cache_salt"}}
        return changes | ({"metadata": self.metadata or {}} if "metadata" in changes else {})


class Upload(Body):
    """Fields that stand beside an uploaded file."""

    model: str | None = None
    name: str | None = None
    metadata: Metadata = {}
    expires_after: ExpiresAfter | None = None
    cache_salt: str | None = None
    if_parent: str | None = None


class Create(Upload):
    """What becomes a memory.

    Attributes:
        model: may be given as everywhere in OpenAI's API; must be the served one.
        input: a text, messages of a chat, or token ids.
        tools: of a chat; they stand in its text if the chat template says so.
        chat_template_kwargs: of a chat, as in vLLM's chat completions.
        if_parent: of an append alone: refuse if the memory is no longer this one.
    """

    input: str | list[Any]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("input")
    @classmethod
    def _is_text(cls, given: str | list[Any]) -> str | list[Any]:
        if not given:
            raise ValueError("it is empty; give a text, messages, or token ids")
        if isinstance(given, list) and not (
            all(type(item) is int for item in given) or all(isinstance(item, dict) for item in given)
        ):
            raise ValueError("a list must hold token ids alone, or messages alone")
        return given

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The messages, if it is a chat."""
        return self.input if isinstance(self.input, list) and isinstance(self.input[0], dict) else None


def new_name(body: Upload) -> str | Keep | None:
    """The name that was asked for; `KEEP` if none was."""
    return body.name if "name" in body.model_fields_set else KEEP


def unflattened(fields: dict[str, str]) -> dict[str, Any]:
    """Fields of a form, of which `metadata[author]` and `expires_after[seconds]` are entries of objects."""
    nested: dict[str, Any] = {}
    for key, value in fields.items():
        outer, bracket, inner = key.partition("[")
        if not bracket:
            nested[key] = value
        elif isinstance(entries := nested.setdefault(outer, {}), dict):
            # of a form all is text
            is_number = key == "expires_after[seconds]" and value.isdecimal()
            entries[inner.removesuffix("]")] = int(value) if is_number else value
    return nested


def described(memory: Manifest) -> dict[str, Any]:
    """A memory as clients see it."""
    read, total = memory.progress or (memory.tokens, memory.tokens)
    return {
        "id": memory.id,
        "object": "memory",
        "status": memory.status,
        "name": memory.name,
        "parent": memory.parent,
        "model": memory.model,
        "created_at": int(memory.created_at),
        "last_used_at": int(memory.last_used_at) or None,
        "expires_after": memory.expires_after and memory.expires_after.model_dump(),
        "expires_at": None if memory.expires_at is None else int(memory.expires_at),
        "progress": {"read": read, "total": total},
        "usage": {"total_tokens": memory.tokens},
        "segments": memory.segments,
        "bytes": memory.bytes,
        "fingerprint": memory.fingerprint,
        "metadata": memory.metadata,
        "error": None if memory.error is None else {"message": memory.error},
    }
