"""Memories over HTTP: as models that are asked, and what metrics and the log say of that."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.conftest import QUESTION, TEXT
from tests.support.http_memories import TOLERANCE, complete, of_memory, probabilities
from tests.support.small_model import S
from tests.support.tiny_checkpoint import MODEL, encode, metric, options, random_text

pytestmark = pytest.mark.server


def test_a_memory_is_a_model(client, memories, book):
    cards = {card.id: card for card in client.models.list()}
    assert cards[f"{MODEL}:{book}"].parent == MODEL
    assert cards[MODEL].parent is None
    id = memories.get(book)["id"]
    expected = complete(client, TEXT + QUESTION)
    for response in (
        complete(client, QUESTION, book),
        complete(client, QUESTION, id),
        complete(client, QUESTION, extra_body={"vllm_xargs": {"memory": book}}),
        complete(client, encode(QUESTION), book),
    ):
        assert response.choices[0].token_ids == expected.choices[0].token_ids
        assert probabilities(response) == pytest.approx(probabilities(expected), abs=TOLERANCE)
        used = of_memory(response)["used"]
        assert (used["id"], used["tokens"], used["segments"]) == (id, len(TEXT), 20)
        assert response.usage.prompt_tokens == len(QUESTION)
        assert response.usage.prompt_tokens_details.cached_tokens >= len(TEXT)


def test_a_stream_says_that_a_memory_was_used(client, book):
    events = list(complete(client, QUESTION, book, stream=True, stream_options={"include_usage": True}))
    *_, end, usage = events
    assert [event for event in events if getattr(event, "kv_transfer_params", None)] == [end]
    assert of_memory(end)["used"]["tokens"] == len(TEXT)
    assert usage.usage.prompt_tokens == len(QUESTION)
    assert usage.usage.prompt_tokens_details.cached_tokens >= len(TEXT)
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text == complete(client, QUESTION, book).choices[0].text


def test_an_answer_is_saved_with_its_question(client, memories):
    saved = of_memory(complete(client, TEXT, extra_body={"vllm_xargs": {"save_memory": "tale"}}, max_tokens=S))["saved"]
    assert (saved["name"], saved["tokens"], saved["parent"]) == ("tale", len(TEXT) + S, None)
    events = list(complete(client, QUESTION, "tale", stream=True, extra_body={"vllm_xargs": {"save_memory": "tale"}}))
    again = of_memory(events[-1])["saved"]
    assert (again["name"], again["parent"], again["tokens"]) == ("tale", saved["id"], len(TEXT + QUESTION) + S + 20)
    assert memories.get("tale")["id"] == again["id"]


@pytest.mark.parametrize(
    ("request_", "status", "named"),
    [
        ({"memory": "nothing"}, 404, "nothing"),
        ({"memory": "../book"}, 400, "name of a memory"),
        ({"echo": True}, 400, "echo"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, 400, "Beam search"),
        ({"prompt": [5] * (1_048_576 - 20)}, 400, "1048576"),
        ({"prompt": ""}, 400, ""),
        ({"vllm_xargs": {"memory": "other"}}, 400, "Name one"),
        ({"vllm_xargs": {"build_memory": "mem_" + "0" * 32}}, 400, "alone"),
        ({"vllm_xargs": {"memory_skip": -1}}, 400, "memory_skip"),
        ({"vllm_xargs": {"save_memory": "no/name"}}, 400, "name of a memory"),
        ({"vllm_xargs": {"save_memory": '{"nmae": "x"}'}}, 400, "save_memory"),
        ({"vllm_xargs": {"save_memory": "taken"}}, 409, "taken"),
        ({"vllm_xargs": {"save_memory": '{"if_parent": "mem_1"}'}}, 409, "faster"),
        ({"vllm_xargs": {"save_memory": "{}"}, "n": 2, "temperature": 1}, 400, "n is 2"),
        ({"vllm_xargs": {"save_memory": "{}"}, "stop": ["."]}, 400, "Stop strings"),
        ({"vllm_xargs": {"save_memory": "{}"}, "prompt": ["one", "two"]}, 400, "2 prompts"),
        ({"vllm_xargs": {"save_memory": "{}"}, "use_beam_search": True, "n": 2}, 400, "Beam search"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_memory_can_not_do_is_refused_before_anything_is_sent(
    http, memories, book, request_, status, named, stream
):
    if "taken" in str(request_) and not [m for m in memories.list(limit=100)["data"] if m["name"] == "taken"]:
        memories.read("text", "taken")
    request_ = dict(request_)
    memory = request_.pop("memory", book)
    body = {"model": f"{MODEL}:{memory}", "prompt": QUESTION, "max_tokens": 2, "temperature": 0, "stream": stream}
    if stream and "use_beam_search" in request_:
        pytest.skip("vLLM streams no beam search")
    response = http.post("/v1/completions", json=body | request_)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert named in error["message"]
    assert error["code"] == status


def test_routes_that_know_no_memories_know_no_such_model(http, book):
    for route, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
    ):
        assert http.post(route, json={"model": f"{MODEL}:{book}"} | body).status_code == 404


def test_many_clients_ask_one_memory_at_once(client, book):
    questions = [random_text(3 + i, seed=60 + i) for i in range(4)]
    expected = [complete(client, TEXT + question).choices[0].token_ids for question in questions]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: complete(client, question, book), questions))
    assert [answer.choices[0].token_ids for answer in answers] == expected


def test_metrics_count_what_memories_spare(http, memories, client, book):
    names = ("uses_total", "loads_total", "pool_hits_total", "saves_total", "tokens_not_read_total", "builds_total")

    def counts() -> dict[str, float]:
        return {name: metric(http, f"armt_memory_{name}") for name in names}

    complete(client, QUESTION, book)
    before = counts()
    complete(client, QUESTION, book)
    memories.read(random_text(S, seed=35))
    # those of the engine come with a step
    complete(client, QUESTION, book)
    after = {name: value - before[name] for name, value in counts().items()}
    assert after["uses_total"] >= 2
    assert after["pool_hits_total"] >= 1
    assert after["loads_total"] + after["pool_hits_total"] == after["uses_total"]
    assert after["tokens_not_read_total"] >= 2 * 20 * S
    assert after["saves_total"] == after["builds_total"] == 1
    deadline = time.monotonic() + 20
    while metric(http, "armt_memory_held") != (
        held := sum(memory["status"] == "completed" for memory in memories.list(limit=100)["data"])
    ):
        assert time.monotonic() < deadline, held
        time.sleep(0.1)
    assert metric(http, "armt_memory_bytes") > memories.get(book)["bytes"]


def test_the_log_has_a_line_for_a_memory_and_no_word_of_it(memories, log_path: Path):
    words = "unmistakable-needle-in-the-log"
    made = memories.read(words, cache_salt="salt-that-nobody-should-see")
    memories.call("POST", "", 400, json={"input": words, "unknown": words})
    memories.call("POST", "", 400, files={"file": words.encode() + b"\xff"})
    memories.delete(made["id"], cache_salt="salt-that-nobody-should-see")
    log = log_path.read_text(errors="replace")
    assert f"Memory {made['id']} is complete: {len(words)} tokens" in log
    assert words not in log
    assert "salt-that-nobody-should-see" not in log


def test_requests_without_memories_are_as_ever(client):
    response = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=1, extra_body=options())
    assert response.kv_transfer_params is None
