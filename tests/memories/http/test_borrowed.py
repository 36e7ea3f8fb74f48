"""What is borrowed of vLLM's API server, which a new version may have otherwise."""

from __future__ import annotations

import inspect
from typing import Any

from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_armt.memories.http.plugin import MemoriesPlugin
from vllm_armt.memories.http.renderer import MemoryRenderer


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_renderer_is_called_as_it_was():
    given = parameters(OnlineRenderer.preprocess_chat)
    # the further ones are handed on by name
    assert given[:8] == parameters(MemoryRenderer.preprocess_chat)[:8]
    assert parameters(OnlineRenderer.preprocess_cmpl)[:3] == parameters(MemoryRenderer.preprocess_cmpl)[:3]
    assert MemoryRenderer.__init__ is OnlineRenderer.__init__


def test_the_engine_is_asked_as_it_was():
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]


def test_the_handlers_take_what_they_took():
    for handler in (completion.create_completion, chat.create_chat_completion, responses.create_responses):
        assert parameters(handler) == ["request", "raw_request"]
    assert "enable_prompt_tokens_details" in parameters(OpenAIServingCompletion)


def test_the_plugin_is_one():
    assert isinstance(MemoriesPlugin(), EndpointPlugin)
