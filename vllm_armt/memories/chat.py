"""Chats behind memories: what of a rendered chat comes behind the messages that a memory has read.

The text of a memory of messages ends with the last message's content. What closes that message is the template's, and
is read with what comes next: so a memory that was made of messages and one whose last message was generated are alike.

What comes next is found by rendering it behind a stub: messages of the memory's roles, with other contents. All that
the template writes up to the end of the stub (a BOS, a system prompt, tools) is in the memory already. A template that
writes the stub otherwise when messages follow, as those do that strip the thinking of earlier turns, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vllm_armt.memories.errors import InvalidInput

Message = dict[str, Any]
_TOOLS = "tools "


class Render(Protocol):
    """The text of a chat, by the chat template and options of a request.

    generate: whether the beginning of an answer follows the messages.
    tools: whether the request's tools are given to the template.
    """

    def __call__(self, messages: Sequence[Message], *, generate: bool, tools: bool = True) -> Awaitable[str]: ...


@dataclass(frozen=True)
class Outline:
    """What is known of the messages in a memory; kept in its manifest as `roles`.

    Attributes:
        roles: of the messages; none for a memory of plain text.
        tools: digest of the tools that stand in its text.
    """

    roles: tuple[str, ...] = ()
    tools: str | None = None

    @classmethod
    def of(cls, stored: Sequence[str]) -> Outline:
        """As it is kept."""
        if stored and stored[0].startswith(_TOOLS):
            return cls(tuple(stored[1:]), stored[0].removeprefix(_TOOLS))
        return cls(tuple(stored))

    @property
    def stored(self) -> tuple[str, ...]:
        return self.roles if self.tools is None else (_TOOLS + self.tools, *self.roles)

    def with_tools(self, tools: Sequence[dict[str, Any]] | None) -> Outline:
        """With the tools of the chat that begins here."""
        if not tools or self.roles:
            return self
        return replace(self, tools=digest_of(tools))

    def followed_by(self, *roles: str) -> Outline:
        return replace(self, roles=self.roles + roles)


def digest_of(tools: Sequence[dict[str, Any]]) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(tools, sort_keys=True).encode()).hexdigest()[:32]


async def continuation(
    render: Render,
    outline: Outline,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    generate: bool,
) -> str:
    """What comes behind a memory's text when these messages follow.

    Args:
        render: with the request's tools.
        outline: of the memory.
        tools: of the request.
        generate: as `Render`'s.

    Raises:
        InvalidInput: the template writes the memory's messages otherwise when these follow; or it writes the tools
            before the memory's first message, and the memory was read without them.
    """
    if not outline.roles:
        return await render(messages, generate=generate)
    stub = stub_of(outline.roles)
    has_read_tools = bool(tools) and outline.tools == digest_of(tools or ())
    before = _up_to(await render(stub, generate=False, tools=has_read_tools), stub[-1])
    both = await render([*stub, *messages], generate=generate)
    if both.startswith(before):
        return both[len(before) :]
    if not has_read_tools and (await render([*stub, *messages], generate=generate, tools=False)).startswith(before):
        raise InvalidInput(
            "The chat template writes tools before the first message, which the memory has read without these tools. "
            "Make a memory with the same tools, or leave them out."
        )
    raise InvalidInput(
        "The chat template writes a message otherwise once others follow it, so this chat can't go on from a "
        "memory of messages. Use completions, or a memory of plain text."
    )


async def ending(render: Render, roles: Sequence[str]) -> str:
    """What the template writes behind the content of the last message."""
    stub = stub_of(roles)
    whole = await render(stub, generate=False)
    return whole[len(_up_to(whole, stub[-1])) :]


async def check_answer(render: Render, outline: Outline, messages: Sequence[Message]) -> None:
    """Whether an answer stands in the chat as it was generated, also when a question follows: one can go on from it.

    Raises:
        InvalidInput: it does not.
    """
    before = [*stub_of(outline.roles), *messages]
    answer, question = stub_of([*outline.roles, "assistant", "user"])[-2:]
    asked = await render(before, generate=True)
    last = await render([*before, answer], generate=False)
    followed = await render([*before, answer, question], generate=True)
    # a blank that the template writes before an answer, models generate
    if not all(
        text.startswith(asked) and text[len(asked) :].lstrip(" ").startswith(answer["content"])
        for text in (last, followed)
    ):
        raise InvalidInput(
            "The chat template writes an answer otherwise than it is generated, so a chat could not go on from its "
            "memory. Save it by completions, or make it of its messages (POST /v1/memories)."
        )


def stub_of(roles: Sequence[str]) -> list[Message]:
    """Messages of these roles; each content is found in no other."""
    return [
        {"role": role, "content": f"(message {i} of the memory)"}
        # nine letters and digits, as Mistral's templates want it
        | ({"tool_call_id": f"call{i:05}"} if role == "tool" else {})
        for i, role in enumerate(roles)
    ]


def _up_to(text: str, last: Message) -> str:
    begin, content, _ = text.rpartition(last["content"])
    if not content or content in begin:
        raise InvalidInput(
            f"The chat template does not write the content of a message of role {last['role']!r} as it is, so a chat "
            "can't go on from it. Use completions, or a memory of plain text."
        )
    return begin + content
