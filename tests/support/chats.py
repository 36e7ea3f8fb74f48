"""Conversations and chat templates, rendered as transformers renders them, and the parts of them behind memories."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from vllm_armt.memories.chat import Message, Outline, check_answer, continuation, ending


def renderer(
    template: str, given: Sequence[dict[str, Any]] = (), **kwargs: Any
) -> Callable[..., Coroutine[Any, Any, str]]:
    """The `Render` of a request with these tools and chat_template_kwargs."""

    async def render(messages: Sequence[Message], *, generate: bool, tools: bool = True) -> str:
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(given) if given and tools else None,
            chat_template=template,
            add_generation_prompt=generate,
            **kwargs,
        )
        return text

    return render


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def behind(
    template: str,
    outline: Outline,
    messages: list[Message],
    generate: bool = True,
    tools: Sequence[dict[str, Any]] = (),
    **kwargs: Any,
) -> str:
    """What comes behind a memory when these messages follow."""
    return asyncio.run(continuation(renderer(template, tools, **kwargs), outline, messages, tools, generate))


def whole(template: str, messages: list[Message], tools: Sequence[dict[str, Any]] = (), **kwargs: Any) -> str:
    """A conversation that is sent as a whole."""
    return asyncio.run(renderer(template, tools, **kwargs)(messages, generate=True))


def read(
    template: str, messages: list[Message], tools: Sequence[dict[str, Any]] = (), **kwargs: Any
) -> tuple[str, Outline]:
    """The text of a memory of messages, and what it consists of."""
    outline = Outline().with_tools(tools).followed_by(*(message["role"] for message in messages))
    text = behind(template, Outline(), messages, generate=False, tools=tools, **kwargs)
    end = asyncio.run(ending(renderer(template, tools, **kwargs), outline.roles))
    assert text.endswith(end)
    return text.removesuffix(end), outline


def check_save(template: str, outline: Outline, messages: list[Message], **kwargs: Any) -> None:
    """Raises: InvalidInput: no chat could go on from a memory of these messages and their answer."""
    asyncio.run(check_answer(renderer(template, **kwargs), outline, messages))
