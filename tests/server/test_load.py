"""Many clients at a time, and clients that go away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import psutil
import pytest
from torch import Tensor

from tests.support.golden_cases import relative_l2
from tests.support.small_model import VOCAB, S, log_probs, random_prompt
from tests.support.tiny_checkpoint import MODEL, TOLERANCE, metric, options, pages_held, requests_open, served_log_probs

pytestmark = pytest.mark.server

LENGTHS = [5, 180, 3, 9, 40, 7, 1, 12, 16 * S, 2, 8, 61, 16, 17, 120, 11]


def complete(client, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the log-probabilities `[count, V]` that they were chosen from."""
    extra = options(return_token_ids=True, return_tokens_as_token_ids=True)
    (choice,) = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=count, temperature=0, logprobs=VOCAB, extra_body=extra
    ).choices
    return choice.token_ids, served_log_probs(choice.logprobs.top_logprobs)


def error(reference, prompt: list[int], tokens: list[int], served: Tensor) -> float:
    """Relative L2 error of what `complete` returned."""
    return relative_l2(served, log_probs(reference, prompt + tokens)[len(prompt) - 1 :])


def test_many_clients_at_a_time_get_what_each_would_get_alone(client, reference, http):
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    preemptions = metric(http, "num_preemptions_total")
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: complete(client, prompt, 120), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert error(reference, prompt, *answer) < TOLERANCE
    # there are fewer pages than eight requests need
    assert metric(http, "num_preemptions_total") > preemptions


@contextmanager
def stopped_worker() -> Iterator[None]:
    """Hold the server's worker inside a step. It makes the moment certain, and leaves a core to the client."""
    (worker,) = (p for p in psutil.Process().children(recursive=True) if "VLLM::Worker" in " ".join(p.cmdline()))
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_pages(http, stream):
    prompt = random_prompt(100_000, seed=int(stream))
    read, looked_up = metric(http, "prompt_tokens_total"), metric(http, "prefix_cache_queries_total")
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "stream": stream}
    connection = HTTPConnection(http.base_url.host, http.base_url.port, timeout=60)
    with stopped_worker(), closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        time.sleep(3)
    deadline = time.monotonic() + 60
    # counted where a request is admitted: its first step has been scheduled
    while metric(http, "prefix_cache_queries_total") == looked_up or requests_open(http) or pages_held(http):
        assert time.monotonic() < deadline, f"{requests_open(http)} requests and {pages_held(http)} pages are left"
        time.sleep(0.25)
    # counted where a prompt has been read to its end
    assert metric(http, "prompt_tokens_total") == read
