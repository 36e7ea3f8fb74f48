"""A memory is a model: `BASE:NAME` or `BASE:mem_...`, wherever a served model's name stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ModelCard

from vllm_armt.memories.disk.manifest import Manifest
from vllm_armt.memories.errors import InvalidInput


class Names:
    """Of a server.

    Attributes:
        bases: names of the served model; one may hold a colon.
    """

    def __init__(self, bases: Sequence[str]) -> None:
        self.bases = tuple(bases)

    def split(self, model: str | None) -> tuple[str | None, str | None]:
        """The served model and the memory that a name stands for; of other names the name, and no memory."""
        if model is None or model in self.bases:
            return model, None
        fitting = [base for base in self.bases if model.startswith(f"{base}:")]
        if not fitting:
            return model, None
        base = max(fitting, key=len)
        return base, model[len(base) + 1 :]

    def resolve(self, request: Any) -> None:
        """Ask for the served model, with the memory in `vllm_xargs`, if the request's model is a memory.

        Raises:
            InvalidInput: it names another one there.
        """
        base, memory = self.split(request.model)
        if memory is None:
            return
        xargs = request.vllm_xargs or {}
        if xargs.get("memory") not in (None, memory):
            raise InvalidInput(
                f"The model is {request.model!r}, but vllm_xargs asks for the memory {xargs['memory']!r}. Name one."
            )
        request.model, request.vllm_xargs = base, xargs | {"memory": memory}

    def card(self, memory: Manifest, base: ModelCard) -> ModelCard:
        """A memory among the models."""
        own = {"id": f"{base.id}:{memory.name or memory.id}", "parent": base.id, "created": int(memory.created_at)}
        return base.model_copy(update=own)
