"""Servers and engines on one folder, one with two API servers: each knows what any other has read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import OpenAI
from vllm import LLM, SamplingParams

from examples.disaggregated import answer_apart
from tests.server.conftest import QUESTION, TEXT, serving
from tests.support.http_memories import TOLERANCE, Memories, complete, of_memory, probabilities
from tests.support.memories import memory_engine
from tests.support.small_model import S, random_prompt
from tests.support.tiny_checkpoint import metric, random_text, requests_open

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def other(checkpoint: Path, server: str) -> Iterator[str]:
    """The address of another server, whose connections are taken by one of its two API servers."""
    folder, log = f"{checkpoint.parent / 'memories'},prefix", checkpoint.parent / "other.log"
    with serving(checkpoint, folder, "--api-server-count", "2", log=log) as url:
        yield url


@pytest.fixture
def other_client(other: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{other}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def anew(other: str) -> Iterator[Callable[[], Memories]]:
    """Memories of the other server, by a connection of their own, so that either API server may answer."""
    opened: list[httpx.Client] = []

    def connect() -> Memories:
        opened.append(httpx.Client(base_url=other, timeout=60))
        return Memories(opened[-1])

    yield connect
    for client in opened:
        client.close()


class Engine:
    """An engine of this process, asked for completions as a server is."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.completions = llm, self
        self.models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="engine")]))

    def create(self, model: str, prompt: list[int], max_tokens: int, temperature: float) -> Any:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        (output,) = self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        cached = SimpleNamespace(cached_tokens=output.num_cached_tokens)
        usage = SimpleNamespace(prompt_tokens=len(prompt), prompt_tokens_details=cached)
        return SimpleNamespace(choices=output.outputs, usage=usage)


def test_a_memory_is_asked_of_another_server_than_has_read_it(memories, client, other_client):
    expected = complete(client, TEXT + QUESTION)
    made = memories.read(TEXT, "shared")
    answer = complete(other_client, QUESTION, "shared")
    assert of_memory(answer)["used"]["id"] == made["id"]
    assert answer.choices[0].token_ids == expected.choices[0].token_ids
    assert probabilities(answer) == pytest.approx(probabilities(expected), abs=TOLERANCE)
    appended = complete(other_client, QUESTION, "shared", extra_body={"vllm_xargs": {"save_memory": "{}"}})
    assert memories.get("shared")["id"] == of_memory(appended)["saved"]["id"]


def test_every_api_server_reads_and_knows_what_the_other_has_read(memories, checkpoint, other, anew):
    names: list[str] = []

    def readers() -> set[str]:
        log = (checkpoint.parent / "other.log").read_text(errors="replace")
        return set(re.findall(r"\((ApiServer_\d) .*\bis complete: ", log))

    while readers() != {"ApiServer_0", "ApiServer_1"}:
        assert len(names) < 60, "one API server has never answered"
        names.append(f"text-{len(names)}")
        anew().read(random_text(3 * S, seed=len(names)), names[-1])
    for name in (names[0], names[-1]):
        for _ in range(8):
            assert anew().get(name)["status"] == "completed"
    assert metric(anew().http, "armt_memory_builds_total") == len(names)
    # each answer is the same, whoever gives it
    answers = []
    for _ in range(8):
        with OpenAI(base_url=f"{other}/v1", api_key="none", max_retries=0, timeout=60) as once:
            answers.append(complete(once, QUESTION, names[0]).choices[0].token_ids)
    assert answers == answers[:1] * 8
    assert memories.get(names[0])["status"] == "completed"


def test_a_memory_is_deleted_whichever_api_server_reads_it(memories, anew):
    for turn in range(6):
        name = f"long-{turn}"
        begun = anew().call("POST", "", 202, json={"input": random_text(60 * S, seed=turn), "name": name})
        anew().delete(name)
        for _ in range(3):
            anew().get(begun["id"], 404)
    # who reads it ends at the end of a piece at the latest, and leaves nothing
    deadline = time.monotonic() + 60
    while requests_open(anew().http):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not [memory for memory in memories.list(limit=100)["data"] if (memory["name"] or "").startswith("long-")]


def test_one_server_reads_and_another_answers(checkpoint, other_client):
    prompt = random_prompt(30 * S + 7, seed=113)
    folder = f"{checkpoint.parent / 'memories'},prefix"
    with memory_engine(checkpoint, folder, skip_tokenizer_init=False) as llm:
        answerer: Any = Engine(llm)
        prefill, answer = answer_apart(other_client, answerer, prompt, S)
    # all segments that are closed before the last token
    assert answer.cached == (len(prompt) - 1) // S * S
    assert prefill.sent == answer.sent == len(prompt)
