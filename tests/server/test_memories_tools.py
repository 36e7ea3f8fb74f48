"""Tools behind memories: calls are read out of answers and results sent back, as in the whole conversation."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.http_memories import Memories, chat, is_same, of_memory
from tests.support.small_model import S
from tests.support.tiny_checkpoint import MODEL, random_text

pytestmark = pytest.mark.server

READ = [
    {"role": "system", "content": random_text(3 * S, seed=101)},
    {"role": "user", "content": random_text(6 * S + 5, seed=102)},
    {"role": "assistant", "content": random_text(S, seed=103)},
]
QUESTION = {"role": "user", "content": random_text(S + 1, seed=104)}
FUNCTION = {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
# vLLM itself makes the model keep to it where a call is required
STRICT = {
    "name": "clock",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["UTC", "CET", "EST"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
    "strict": True,
}
STRICT_TOOLS: list[Any] = [{"type": "function", "function": STRICT}]
CALL = r'<tool_call>\{"name": "clock", "arguments": \{"zone": "[A-Z]{8}"\}\}</tool_call>'
"""What a random model, which calls no tools, is made to write; eight letters are its own."""


@pytest.fixture(scope="module")
def read(memories: Memories) -> str:
    """The name of a memory of messages and tools."""
    memories.read(READ, "with-tools", tools=TOOLS)
    return "with-tools"


@pytest.fixture(scope="module")
def strict(memories: Memories) -> str:
    """The same with the strict tool."""
    memories.read(READ, "with-strict-tools", tools=STRICT_TOOLS)
    return "with-strict-tools"


def ask(client, messages, memory: str | None = None, save: str | None = None, **request: Any):
    """An answer that calls the tool, perhaps behind a memory."""
    extra: dict[str, Any] = {"ignore_eos": False, "structured_outputs": {"regex": CALL}}
    if save is not None:
        extra["vllm_xargs"] = {"save_memory": save}
    return chat(client, messages, memory, tools=TOOLS, max_tokens=200, extra_body=extra, **request)


def called(answer) -> tuple[str, str]:
    """The function and the zone of the one call in an answer."""
    (call,) = answer.choices[0].message.tool_calls
    (zone,) = json.loads(call.function.arguments).values()
    return call.function.name, zone


def test_a_tool_is_called_behind_a_memory_and_its_result_goes_on_from_there(client, memories, read):
    answer, expected = ask(client, [QUESTION], read, save="called"), ask(client, [*READ, QUESTION])
    assert is_same(answer, expected)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert called(answer) == called(expected)
    assert called(answer)[0] == "clock"
    assert answer.usage.prompt_tokens < expected.usage.prompt_tokens - 9 * S
    message = expected.choices[0].message
    calls = [call.model_dump() for call in message.tool_calls]
    said = [*READ, QUESTION, {"role": "assistant", "content": message.content, "tool_calls": calls}]
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "noon"}
    # the template writes the call as it was generated, so this is the conversation that others send whole
    told = chat(client, [result], "called", tools=TOOLS, extra_body={"vllm_xargs": {"save_memory": "{}"}})
    assert is_same(told, chat(client, [*said, result], tools=TOOLS))
    assert of_memory(told)["saved"]["name"] == "called"
    said += [result, {"role": "assistant", "content": told.choices[0].message.content}]
    assert is_same(ask(client, [QUESTION], "called"), ask(client, [*said, QUESTION]))


def test_calls_and_results_are_read_into_a_memory(client, memories):
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    said = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
    memories.read(said, "asked", tools=TOOLS)
    assert is_same(chat(client, [result], "asked", tools=TOOLS), chat(client, [*said, result], tools=TOOLS))
    memories.append("asked", [result], tools=TOOLS)
    assert is_same(ask(client, [QUESTION], "asked"), ask(client, [*said, result, QUESTION]))


def test_a_call_streams_behind_a_memory(client, read):
    whole = ask(client, [QUESTION], read)
    deltas = [event.choices[0].delta for event in ask(client, [QUESTION], read, stream=True) if event.choices]
    calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(call.name or "" for call in calls) == "clock"
    assert json.loads("".join(call.arguments or "" for call in calls)) == {"zone": called(whole)[1]}
    assert not "".join(delta.content or "" for delta in deltas)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}, "none"])
def test_the_choice_of_tools_is_as_without_a_memory(client, strict, choice):
    request = {"tools": STRICT_TOOLS, "tool_choice": choice, "max_tokens": 100, "extra_body": {"ignore_eos": False}}
    answer, expected = (chat(client, *asked, **request) for asked in (([QUESTION], strict), ([*READ, QUESTION],)))
    assert is_same(answer, expected)
    calls = answer.choices[0].message.tool_calls or []
    assert {call.function.name for call in calls} == ({"clock"} if choice != "none" else set())


def test_responses_know_the_tools_of_a_memory(client, strict):
    request = {"temperature": 0, "max_output_tokens": 100, "tool_choice": "required"}
    tools: list[Any] = [{"type": "function", **STRICT}]
    calls = [
        [
            (item.name, item.arguments)
            for item in client.responses.create(model=model, input=messages, tools=tools, **request).output
            if item.type == "function_call"
        ]
        for model, messages in ((f"{MODEL}:{strict}", [QUESTION]), (MODEL, [*READ, QUESTION]))
    ]
    assert calls[0] == calls[1] != []


def test_tools_that_a_memory_has_not_read_are_refused(client, memories):
    memories.read(READ, "without-tools")
    with pytest.raises(openai.BadRequestError, match="without these tools"):
        ask(client, [QUESTION], "without-tools")


def test_behind_a_plain_text_the_tools_are_read_with_the_question(client, memories):
    memories.read(random_text(5 * S + 2, seed=105), "plain-text")
    answer = ask(client, [QUESTION], "plain-text", save="plain-called")
    assert called(answer)[0] == "clock"
    alone = ask(client, [QUESTION])
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    result = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
    more = chat(client, [result], "plain-called", tools=TOOLS)
    assert more.usage.prompt_tokens == len("\ntool: noon\nassistant: ")
