"""vLLM's renderer, which also renders prompts that stand behind a memory, and refuses before the engine what can't be.

All of vLLM's handlers share one renderer and adjust a request in it, so this is where `vllm_xargs` become what the
engine is asked for: the memory by its id, and a chat's roles with what is saved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.inputs import TextPrompt
from vllm.renderers import ChatParams, merge_kwargs
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_armt.memories.args import FIELDS, MemoryArgs
from vllm_armt.memories.chat import Message, Outline, Render, check_answer, continuation, ending
from vllm_armt.memories.disk.manifest import Manifest, explain
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.errors import InvalidInput
from vllm_armt.memories.http.answers import ANSWER, Answer


class MemoryRenderer(OnlineRenderer):
    """`OnlineRenderer` of a server that keeps memories.

    Attributes:
        store: the memories.
    """

    store: Store

    @classmethod
    def adopt(cls, renderer: OnlineRenderer, store: Store) -> MemoryRenderer:
        """Make vLLM's renderer one of these: its handlers hold it already."""
        renderer.__class__ = cls
        assert isinstance(renderer, MemoryRenderer)
        renderer.store = store
        return renderer

    # what vLLM's handlers call --------------------------------------------------------------------------------------

    async def preprocess_chat(
        self,
        request: Any,
        messages: list[Any],
        default_template: str | None,
        default_template_content_format: Any,
        default_template_kwargs: dict[str, Any] | None,
        tool_dicts: list[dict[str, Any]] | None = None,
        parser: Any = None,
        **more: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Render a chat; one that goes on from a memory, without what the memory has read."""
        defaults = (default_template, default_template_content_format, default_template_kwargs, tool_dicts, parser)
        args = _args_of(request)
        if args is None:
            return await super().preprocess_chat(request, messages, *defaults, **more)
        if args.memory_skip:
            raise InvalidInput(
                "memory_skip is for prompts of token ids; of a chat it is known what the memory stands for."
            )
        memory = await self._look_up(request, args)
        outline = Outline.of(memory.roles if memory is not None else ())
        render = self._render(request, *defaults[:4])
        if args.save_memory is not None:
            await self._prepare_save(request, args, outline, messages, tool_dicts, render)
        if memory is None:
            return await super().preprocess_chat(request, messages, *defaults, **more)
        text = await continuation(render, outline, messages, tool_dicts, generate=True)
        ids = await self._ids(request, self._behind(memory, text))
        self._check_length(memory, len(ids))
        # ids that are given are taken as they are, and all the rest is vLLM's
        request.kv_transfer_params = (request.kv_transfer_params or {}) | {"prompt_token_ids": list(ids)}
        _, (engine_input,) = await super().preprocess_chat(request, messages, *defaults, **more)
        if engine_input.get("prompt_token_ids") != ids:
            raise InvalidInput("Behind a memory messages can hold text only.")
        return [], [engine_input | {"prompt": text}]

    async def preprocess_cmpl(self, request: Any, prompts: Sequence[Any], **more: Any) -> list[Any]:
        """Render completions; ones that go on from a memory begin no text, unless the request says so."""
        args = _args_of(request)
        if args is None:
            return await super().preprocess_cmpl(request, prompts, **more)
        if args.save_memory is not None and len(prompts) > 1:
            raise InvalidInput(f"{len(prompts)} prompts can't become one memory. Send one prompt a request.")
        memory = await self._look_up(request, args)
        if memory is not None and memory.tokens and "add_special_tokens" not in request.model_fields_set:
            request.add_special_tokens = False
        inputs = await super().preprocess_cmpl(request, prompts, **more)
        for engine_input in inputs if memory is not None else ():
            self._check_length(memory, len(engine_input["prompt_token_ids"]) - args.memory_skip)
        return inputs

    # what becomes a memory ------------------------------------------------------------------------------------------

    async def text_of(
        self,
        messages: list[Message],
        parent: Manifest | None,
        tools: list[dict[str, Any]] | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> tuple[list[int], Outline]:
        """What messages add to a memory's text, and what it then consists of.

        Args:
            messages: as of a chat completion.
            parent: the memory; None: they begin a text.

        Raises:
            InvalidInput: the template can't go on from the memory, or does not end with a message as it is.
        """
        fields = {
            "messages": messages,
            "add_generation_prompt": False,
            "chat_template_kwargs": chat_template_kwargs,
            **({"tools": tools} if tools else {}),
        }
        try:
            request = ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise InvalidInput(f"These messages are not valid: {explain(error)}.") from None
        tool_dicts = [tool.model_dump() for tool in request.tools] if request.tools else None
        defaults = (self.chat_template, self.chat_template_content_format, self.default_chat_template_kwargs)
        refused = self.validate_chat_template(None, chat_template_kwargs, self.trust_request_chat_template)
        if refused is not None:
            raise InvalidInput(refused.error.message)
        render = self._render(request, *defaults, tool_dicts)
        outline = Outline.of(parent.roles if parent is not None else ())
        text = await continuation(render, outline, request.messages, tool_dicts, generate=False)
        outline = outline.with_tools(tool_dicts).followed_by(*_roles(request.messages))
        end = await ending(render, outline.roles)
        if not text.endswith(end):
            raise InvalidInput(
                "The chat template ends a message by what is in it, so no chat can go on from it. Send the text itself."
            )
        return await self._ids(request, self._behind(parent, text[: len(text) - len(end)]), bounded=False), outline

    # parts ----------------------------------------------------------------------------------------------------------

    async def _look_up(self, request: Any, args: MemoryArgs) -> Manifest | None:
        """The memory that a request goes on from, by whose id the engine is now asked for it."""
        memory = None
        if args.memory is not None:
            memory = await asyncio.to_thread(self._completed, args.memory, request.cache_salt)
            request.vllm_xargs = request.vllm_xargs | {"memory": memory.id}
        if args.save_memory is not None:
            await asyncio.to_thread(args.save_memory.check, self.store, memory, request.cache_salt)
        answer = ANSWER.get()
        if answer is None:
            ANSWER.set(answer := Answer())
        answer.memory = memory
        return memory

    def _completed(self, reference: str, salt: str | None) -> Manifest:
        with self.store.use(reference, salt=salt) as lease:
            return lease.memory

    async def _prepare_save(
        self,
        request: Any,
        args: MemoryArgs,
        outline: Outline,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        render: Render,
    ) -> None:
        """Let the engine save a chat so that its next turn can go on from it."""
        save = args.save_memory
        assert save is not None
        if save.after == "prompt":
            raise InvalidInput(
                'A chat is saved with its answer; leave out "after", or send messages alone to POST /v1/memories.'
            )
        saved = outline.with_tools(tools).followed_by(*_roles(messages))
        if not request.build_chat_params(None, "auto").chat_template_kwargs.get("continue_final_message"):
            await check_answer(render, outline, messages)
            saved = saved.followed_by("assistant")
        # the template ends the answer
        changed = {"roles": saved.stored, "include_stop_token": False}
        text = save.model_copy(update=changed).model_dump_json(include=save.model_fields_set | changed.keys())
        request.vllm_xargs = request.vllm_xargs | {"save_memory": text}

    def _render(
        self,
        request: Any,
        template: str | None,
        content_format: Any,
        template_kwargs: dict[str, Any] | None,
        tool_dicts: list[dict[str, Any]] | None,
    ) -> Render:
        """How the messages of a request are rendered; as vLLM's `preprocess_chat` does it."""

        async def render(messages: Sequence[Message], *, generate: bool, tools: bool = True) -> str:
            defaults = merge_kwargs(template_kwargs, {"tools": tool_dicts if tools else None, "tokenize": False})
            params: ChatParams = request.build_chat_params(template, content_format).with_defaults(defaults)
            if not generate:
                whole = {"add_generation_prompt": False, "continue_final_message": False}
                params = replace(params, chat_template_kwargs=params.chat_template_kwargs | whole)
            _, prompt = await self.renderer.render_messages_async(list(messages), params)
            text = prompt.get("prompt")
            if not isinstance(text, str) or "multi_modal_data" in prompt:
                raise InvalidInput(
                    "This chat is not rendered to a text, so no memory can be used or saved. Use completions."
                )
            return text

        return render

    def _behind(self, memory: Manifest | None, text: str) -> str:
        """A text without the token that begins a text, if one stands before it."""
        bos = getattr(self.renderer.get_tokenizer(), "bos_token", None)
        return text.removeprefix(bos) if bos and memory is not None and memory.tokens else text

    async def _ids(self, request: Any, text: str, *, bounded: bool = True) -> list[int]:
        params = replace(request.build_tok_params(self.model_config), add_special_tokens=False)
        if not bounded:
            params = replace(params, max_total_tokens=None)
        prompt = await self.renderer.tokenize_prompt_async(TextPrompt(prompt=text), params)
        return prompt["prompt_token_ids"]

    def _check_length(self, memory: Manifest | None, tokens: int) -> None:
        """Refuse a question that has no room behind the end of a memory."""
        assert memory is not None
        before, most = len(memory.last) + len(memory.pending), self.model_config.max_model_len
        if tokens < 1:
            raise InvalidInput("Nothing is asked behind the memory: give at least one token.")
        if before + tokens >= most:
            raise InvalidInput(
                f"The question has {tokens} tokens and stands behind {before} of the end of the memory: together "
                f"{before + tokens}, but fewer than max_model_len ({most}) are allowed. Shorten it, or append it to "
                "the memory."
            )


def _args_of(request: Any) -> MemoryArgs | None:
    """What a request of any of vLLM's routes asks of memories.

    Raises:
        InvalidInput: it can't be had, or not together with something else.
    """
    xargs = getattr(request, "vllm_xargs", None) or {}
    if not any(xargs.get(field) is not None for field in FIELDS):
        return None
    given = {field: getattr(request, field, None) for field in ("n", "stop", "prompt_logprobs")}
    if getattr(request, "echo", False) and xargs.get("memory") is not None:
        raise InvalidInput("echo can't be had behind a memory, whose text is not at hand. Leave it out.")
    args = MemoryArgs.of(SamplingParams(extra_args=xargs, **{k: v for k, v in given.items() if v is not None}))
    assert args is not None
    if args.build_memory is not None:
        raise InvalidInput("build_memory is not for clients: send a text to POST /v1/memories, or save_memory.")
    if getattr(request, "use_beam_search", False):
        raise InvalidInput("Beam search neither uses nor saves memories. Leave it out.")
    if getattr(request, "prompt_embeds", None) is not None:
        raise InvalidInput("Memories are of text: prompt_embeds can't be used.")
    if args.save_memory is not None and (given["n"] or 1) > 1:
        raise InvalidInput(f"n is {given['n']}, but one request saves one memory. Use n=1.")
    return args


def _roles(messages: Sequence[Any]) -> list[str]:
    return [str(message["role"]) for message in messages]
