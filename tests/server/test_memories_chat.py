"""Chats behind memories: turn by turn, as the whole conversation."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.http_memories import Memories, chat, is_same, of_memory
from tests.support.small_model import S
from tests.support.tiny_checkpoint import MODEL, options, random_text, rendered

pytestmark = pytest.mark.server

READ = [
    {"role": "system", "content": random_text(2 * S + 3, seed=81)},
    {"role": "user", "content": random_text(9 * S, seed=82)},
    {"role": "assistant", "content": random_text(S, seed=83)},
]
QUESTION = {"role": "user", "content": random_text(S + 1, seed=84)}


@pytest.fixture(scope="module")
def read(memories: Memories) -> str:
    """The name of a memory of `READ`."""
    memories.read(READ, "read")
    return "read"


def test_a_question_behind_messages_is_answered_as_in_the_whole_conversation(client, memories, read):
    text = rendered(READ).removesuffix("\nassistant: ")
    assert memories.get(read)["usage"]["total_tokens"] == len(text)
    answer, expected = chat(client, [QUESTION], read), chat(client, [*READ, QUESTION])
    assert is_same(answer, expected)
    assert answer.usage.prompt_tokens == len(rendered([*READ, QUESTION])) - len(text)
    assert of_memory(answer)["used"]["tokens"] == len(text)
    assert answer.usage.prompt_tokens_details.cached_tokens >= len(text)


def test_each_turn_sends_only_what_is_new(client, memories, read):
    said, memory = [*READ], read
    for turn in range(3):
        question = {"role": "user", "content": random_text(S + turn, seed=90 + turn)}
        expected = chat(client, [*said, question])
        answer = chat(
            client, [question], memory, extra_body={"vllm_xargs": {"save_memory": "talk" if turn == 0 else "{}"}}
        )
        assert is_same(answer, expected)
        assert answer.usage.prompt_tokens < 4 * S
        said += [question, {"role": "assistant", "content": answer.choices[0].message.content}]
        memory = "talk"
        assert of_memory(answer)["saved"]["name"] == "talk"
        assert memories.get("talk")["usage"]["total_tokens"] == len(rendered(said).removesuffix("\nassistant: "))


def test_a_chat_begins_without_a_memory(client, memories):
    first = chat(client, [QUESTION], extra_body={"vllm_xargs": {"save_memory": "new"}})
    said = [QUESTION, {"role": "assistant", "content": first.choices[0].message.content}]
    more = {"role": "user", "content": "and then?"}
    assert is_same(chat(client, [more], "new"), chat(client, [*said, more]))


def test_an_answer_that_ends_by_itself_is_closed_by_the_template(client, memories, read):
    """What ended it is no part of the memory."""
    stop = chat(client, [QUESTION], read).choices[0].token_ids[3]
    request = {
        "extra_body": {"vllm_xargs": {"save_memory": "ended"}, "stop_token_ids": [stop], "skip_special_tokens": False}
    }
    answer = chat(client, [QUESTION], read, **request)
    assert answer.choices[0].finish_reason == "stop"
    content = answer.choices[0].message.content
    said = [*READ, QUESTION, {"role": "assistant", "content": content}]
    assert memories.get("ended")["usage"]["total_tokens"] == len(rendered(said).removesuffix("\nassistant: "))
    more = {"role": "user", "content": "and then?"}
    assert is_same(chat(client, [more], "ended"), chat(client, [*said, more]))


def test_behind_a_plain_text_a_chat_is_as_if_it_followed_the_text(client, memories):
    text = random_text(5 * S + 2, seed=85)
    memories.read(text, "plain")
    (choice,) = chat(client, [QUESTION], "plain").choices
    whole = client.completions.create(
        model=MODEL,
        prompt=text + rendered([QUESTION]),
        max_tokens=20,
        temperature=0,
        extra_body=options(return_token_ids=True),
    )
    assert choice.token_ids == whole.choices[0].token_ids


def test_messages_are_appended_to_messages(client, memories, read):
    memories.read(READ, "more")
    added = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    memories.append("more", added)
    assert is_same(chat(client, [QUESTION], "more"), chat(client, [*READ, *added, QUESTION]))


def test_clients_that_append_messages_at_once_are_read_one_behind_the_other(client, memories):
    base = memories.read(READ, "together")["id"]
    added = [[{"role": "user", "content": random_text(7 + i, seed=70 + i)}] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda messages: memories.append("together", messages), added))
    behind = {memory["parent"]: (memory["id"], messages) for memory, messages in zip(made, added, strict=True)}
    said = [*READ]
    while base in behind:
        base, messages = behind[base]
        said += messages
    assert len(said) == len(READ) + 4
    assert memories.get("together")["id"] == base
    assert is_same(chat(client, [QUESTION], "together"), chat(client, [*said, QUESTION]))
    # who wants to be first says so
    memories.append("together", added[0], 409, if_parent=made[0]["parent"])


def test_a_streamed_answer_is_the_same_and_saved(client, memories, read):
    events = list(chat(client, [QUESTION], read, stream=True, extra_body={"vllm_xargs": {"save_memory": "streamed"}}))
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == chat(client, [QUESTION], read).choices[0].message.content
    report = of_memory(events[-1])
    assert report["used"]["name"] == "read"
    assert report["saved"]["id"] == memories.get("streamed")["id"]


def test_responses_go_on_from_a_memory(client, memories, read):
    expected = chat(client, [*READ, QUESTION], max_tokens=12).choices[0].message.content
    request = {
        "model": f"{MODEL}:{read}",
        "max_output_tokens": 12,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    for sent in (QUESTION["content"], [QUESTION]):
        response = client.responses.create(input=sent, **request)
        assert response.output_text == expected
        assert of_memory(response)["used"]["name"] == read
        assert response.usage.input_tokens_details.cached_tokens >= 9 * S
    *_, last = client.responses.create(input=[QUESTION], stream=True, **request)
    assert last.response.output_text == expected
    assert of_memory(last.response)["used"]["name"] == read
    saving = request | {"extra_body": {"ignore_eos": True, "vllm_xargs": {"save_memory": "response"}}}
    saved = client.responses.create(input=QUESTION["content"], **saving)
    more = {"role": "user", "content": "and then?"}
    said = [*READ, QUESTION, {"role": "assistant", "content": saved.output_text}]
    assert is_same(chat(client, [more], "response"), chat(client, [*said, more]))


def test_structured_output_behind_a_memory(client, memories, read):
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    request = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    answers = [
        chat(client, messages, memory, max_tokens=30, extra_body={"ignore_eos": False}, **request)
        for messages, memory in (([QUESTION], read), ([*READ, QUESTION], None))
    ]
    assert is_same(*answers)
    assert answers[0].choices[0].message.content.lstrip().startswith("{")


def test_a_batch_of_chats_behind_a_memory(http, client, read):
    questions = [QUESTION, {"role": "user", "content": "and then?"}]
    body = {"messages": [[question] for question in questions], "max_tokens": 20, "temperature": 0, "model": MODEL}
    response = http.post("/v1/chat/completions/batch", json=options(**body, vllm_xargs={"memory": read}))
    expected = [chat(client, [*READ, question]).choices[0].message.content for question in questions]
    assert [choice["message"]["content"] for choice in response.raise_for_status().json()["choices"]] == expected


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"vllm_xargs": {"memory_skip": 3}}, "memory_skip"),
        ({"vllm_xargs": {"save_memory": json.dumps({"after": "prompt"})}}, "saved with its answer"),
        ({"use_beam_search": True, "n": 2}, "Beam search"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"vllm_xargs": {"save_memory": "{}"}, "n": 2, "temperature": 1}, "n is 2"),
    ],
)
def test_what_a_chat_can_not_do_is_refused(client, read, extra, named):
    with pytest.raises(openai.BadRequestError, match=named):
        chat(client, [QUESTION], read, extra_body=extra)


def test_a_chat_longer_than_there_is_room_for_is_refused(client, read):
    question = {"role": "user", "content": "a" * (1_048_576 - 2 * S)}
    with pytest.raises(openai.BadRequestError, match="1048576"):
        chat(client, [question], read)
