"""What else vLLM's server offers: its other APIs, tools, structured output and beams, over segments that close."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from transformers import PreTrainedModel

from tests.support.small_model import VOCAB, S, log_probs, random_prompt
from tests.support.tiny_checkpoint import CHARACTERS, MODEL, encode, options, random_text, rendered

pytestmark = pytest.mark.server

QUESTION: Any = {"role": "user", "content": random_text(3 * S, seed=71)}
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        # or vLLM takes any JSON for arguments
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["utc", "cet"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
NO_BLANKS = {str(CHARACTERS.index(blank)): -100 for blank in ("\n", " ", "\t") if blank in CHARACTERS}
"""JSON may have any number of them, and this model would."""


def answer(client: OpenAI, max_tokens: int = 2 * S) -> str:
    """What a chat completion says to the question."""
    chat = client.chat.completions.create(model=MODEL, messages=[QUESTION], max_tokens=max_tokens, temperature=0)
    return chat.choices[0].message.content or ""


def test_responses_say_what_chats_say(client):
    request = {"model": MODEL, "input": [QUESTION], "max_output_tokens": 2 * S, "temperature": 0}
    response = client.responses.create(**request)
    assert response.output_text == answer(client)
    assert response.usage.input_tokens == len(rendered([QUESTION]))
    *_, last = client.responses.create(**request, stream=True)
    assert last.response.output_text == response.output_text


def test_messages_of_anthropics_api_say_what_chats_say(client, http: httpx.Client):
    request = {"model": MODEL, "messages": [QUESTION], "max_tokens": 2 * S, "temperature": 0}
    message = http.post("/v1/messages", json=request).raise_for_status().json()
    assert [part["text"] for part in message["content"]] == [answer(client)]
    assert message["usage"] == {"input_tokens": len(rendered([QUESTION])), "output_tokens": 2 * S}
    with http.stream("POST", "/v1/messages", json=request | {"stream": True}) as stream:
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: {")]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == answer(client)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}], ids=str)
def test_a_tool_is_called_over_boundaries(client, choice):
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[QUESTION],
        tools=[TOOL],
        tool_choice=choice,
        max_tokens=20 * S,
        temperature=0,
        logit_bias=NO_BLANKS,
    )
    call = chat.choices[0].message.tool_calls[0]
    assert call.function.name == "clock"
    assert json.loads(call.function.arguments)["zone"] in ("utc", "cet")


@pytest.mark.parametrize("offset", range(0, S, 3))
def test_a_schema_is_followed_over_boundaries_and_the_model_chooses(client, reference: PreTrainedModel, offset):
    """Two strings part behind more than a segment, at another place of their segment each time."""
    question = {"role": "user", "content": random_text(2 * S + offset, seed=72)}
    schema = {"enum": ["x" * (2 * S) + end for end in "ab"]}
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[question],
        max_tokens=4 * S,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "choice", "schema": schema}},
    )
    common = encode(rendered([question]) + '"' + "x" * (2 * S))
    predicted = log_probs(reference, [*common, 0])[-1]
    likelier = max("ab", key=lambda end: float(predicted[encode(end)[0]]))
    assert json.loads(chat.choices[0].message.content) == "x" * (2 * S) + likelier
    assert chat.choices[0].finish_reason == "stop"


def test_beams_over_a_boundary_are_those_of_a_search_by_hand(client, reference: PreTrainedModel):
    prompt, width, count = random_prompt(2 * S - 4, seed=73), 4, 9
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        grown = []
        for score, tokens in beams:
            predicted = log_probs(reference, [*prompt, *tokens, 0])[-1].tolist()
            grown += [(score + predicted[token], [*tokens, token]) for token in range(VOCAB)]
        beams = sorted(grown, reverse=True)[:width]
    completion = client.completions.create(
        model=MODEL,
        prompt=prompt,
        n=width,
        max_tokens=count,
        temperature=0,
        extra_body=options(use_beam_search=True),
    )
    found = [choice.text for choice in completion.choices]
    assert found == ["".join(CHARACTERS[token] for token in tokens) for _, tokens in beams]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "non-empty"),
        ([""], "empty"),
        ([], "at least one prompt"),
        ([[]], "empty"),
        (["a", ""], "empty"),
        ([1, -1], "greater than or equal to 0"),
        ([1, VOCAB], f"Token id {VOCAB} is out of vocabulary"),
        ([1, 1 << 40], "out of vocabulary"),
    ],
    ids=str,
)
def test_a_prompt_that_is_none_is_refused(client, prompt, named):
    with pytest.raises(openai.BadRequestError, match=named):
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.completion_tokens == 1
