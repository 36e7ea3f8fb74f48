"""What a request asks of memories: fields of `SamplingParams.extra_args` (HTTP: `vllm_xargs`), checked.

| field | |
|---|---|
| `memory` | name or id of the memory that the prompt goes on from |
| `memory_skip` | so many first tokens of the prompt stand for the memory, as in a chat's rendering, and are dropped |
| `save_memory` | what has been read becomes a memory: its name, or `SaveArgs` as an object or as JSON |
| `build_memory` | id of a memory in progress: the prompt is its next piece; goes with no other field (`reading`) |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_armt.memories.disk.manifest import ExpiresAfter, Manifest, Metadata, Roles, check_name, explain
from vllm_armt.memories.errors import Conflict, InvalidInput, MemoriesError

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_armt.memories.disk.store import Store

FIELDS = ("memory", "memory_skip", "save_memory", "build_memory")


class SaveArgs(BaseModel):
    """How a request's text is saved.

    Attributes:
        name: of the new memory. Not given: the name of the memory that the request uses moves to it. None: no name.
        after: "answer": the prompt and all that was generated, when the request has ended; "prompt": the prompt alone.
        include_stop_token: whether the token that ended the answer (end of sequence, or of `stop_token_ids`) belongs to
            the memory. A chat's does not: the template puts it behind the answer in the next turn.
        if_parent: refuse unless the memory that is used has this id.
        roles, metadata, expires_after: see `builds.Options`; not given: those of the memory that is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = None
    after: Literal["answer", "prompt"] = "answer"
    include_stop_token: bool = True
    if_parent: str | None = None
    roles: Roles = ()
    metadata: Metadata = {}
    expires_after: ExpiresAfter | None = None

    @classmethod
    def of(cls, given: object) -> Self:
        """Raises: InvalidInput: it is neither a name nor such an object."""
        if isinstance(given, str) and not given.lstrip().startswith("{"):
            given = {"name": given}
        try:
            args = cls.model_validate_json(given if isinstance(given, str) else json.dumps(given))
        except (TypeError, ValueError) as error:
            why = explain(error) if isinstance(error, ValidationError) else "it is no JSON"
            raise InvalidInput(
                f"save_memory must be a name or an object with some of {', '.join(cls.model_fields)}: {why}."
            ) from None
        if args.name is not None:
            check_name(args.name)
        return args

    def check(self, store: Store, memory: Manifest | None, salt: str | None) -> None:
        """Refuse early what the store would refuse when all is read.

        Args:
            memory: that the request goes on from.
            salt: the client's cache_salt.

        Raises:
            Conflict: the name is taken, or somebody was faster.
        """
        if self.if_parent is not None and memory is not None and memory.id != self.if_parent:
            raise Conflict(f"Somebody was faster: the memory is {memory.id} now, not {self.if_parent}.", memory.id)
        if self.name is not None and (memory is None or memory.name != self.name):
            try:
                other = store.get(self.name, salt=salt)
            except MemoriesError:
                return
            if other.status in ("completed", "in_progress"):
                raise Conflict(
                    f"The name {self.name!r} is taken by {other.id}. Delete that, or choose another.", other.id
                )

    @property
    def options(self) -> dict[str, Any]:
        """What was given of `builds.Options`."""
        ours = {"after", "include_stop_token"}
        return {field: getattr(self, field) for field in self.model_fields_set - ours}


@dataclass(frozen=True)
class MemoryArgs:
    """What a request asks for; the attributes are the fields above."""

    memory: str | None = None
    memory_skip: int = 0
    save_memory: SaveArgs | None = None
    build_memory: str | None = None

    @classmethod
    def of(cls, params: SamplingParams | None) -> Self | None:
        """Of a request; None if it asks for nothing of memories.

        Raises:
            InvalidInput: a field has a value that is not allowed, or goes with something that it can't go with.
        """
        extra: Mapping[str, Any] = (params.extra_args if params is not None else None) or {}
        given = {field: extra[field] for field in FIELDS if extra.get(field) is not None}
        if not given or params is None:
            return None
        for field in ("memory", "build_memory"):
            if field in given and not isinstance(given[field], str):
                raise InvalidInput(f"{field} must be a text: the id or the name of a memory.")
        skip = given.get("memory_skip", 0)
        if not isinstance(skip, int) or isinstance(skip, bool) or skip < 0:
            raise InvalidInput(f"memory_skip is {skip!r}; it must be a number of tokens.")
        if "build_memory" in given and len(given) > 1:
            raise InvalidInput("build_memory is given alone; the memory in progress says all the rest.")
        if skip and "memory" not in given:
            raise InvalidInput("memory_skip is the number of tokens that stand for a memory; give `memory`, too.")
        save = SaveArgs.of(given["save_memory"]) if "save_memory" in given else None
        if save is not None and save.if_parent is not None and "memory" not in given:
            raise InvalidInput("save_memory.if_parent compares with the memory that is used; give `memory`, too.")
        args = cls(given.get("memory"), skip, save, given.get("build_memory"))
        args._check_params(params)
        return args

    def _check_params(self, params: SamplingParams) -> None:
        if params.prompt_logprobs is not None and self.reference is not None:
            raise InvalidInput(
                "prompt_logprobs can't be had behind a memory, whose text is not read again. Leave them out."
            )
        if not self.saves:
            return
        if params.n > 1 and self.save_memory is not None and self.save_memory.name is not None:
            raise InvalidInput(f"n is {params.n}, but one name can be given to one memory only. Use n=1 or no name.")
        if params.stop:
            raise InvalidInput(
                "Stop strings end a request before its memory is saved. Use stop_token_ids, or leave out `stop`."
            )

    @property
    def reference(self) -> str | None:
        """The memory that the prompt goes on from."""
        return self.memory or self.build_memory

    @property
    def saves(self) -> bool:
        """Whether something is saved."""
        return self.save_memory is not None or self.build_memory is not None
