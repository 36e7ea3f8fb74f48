"""Many clients at a time, and clients that go away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import pytest
from golden_cases import relative_l2
from server.tiny import MODEL, TOLERANCE, metric, options, pages_held, requests_open, served_log_probs
from small_model import VOCAB, S, log_probs, random_prompt
from torch import Tensor

pytestmark = pytest.mark.server

LENGTHS = [5, 180, 3, 9, 40, 7, 1, 12, 16 * S, 2, 8, 61, 16, 17, 120, 11]
VERY_LONG = 1_000_000
"""Tokens that take most of a minute to read, of which a test needs the first seconds."""


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


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        # asking for metrics more often would take the server the time that it reads in
        time.sleep(0.25)


def test_many_clients_at_a_time_get_what_each_would_get_alone(client, reference, http):
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    preemptions = metric(http, "num_preemptions_total")
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: complete(client, prompt, 120), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert error(reference, prompt, *answer) < TOLERANCE
    # there are fewer pages than eight requests need
    assert metric(http, "num_preemptions_total") > preemptions


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_pages(client, reference, http, stream):
    prompt, short = random_prompt(VERY_LONG, seed=int(stream)), random_prompt(20)
    prompts_read = metric(http, "prompt_tokens_total")
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "stream": stream}
    with closing(HTTPConnection(http.base_url.host, http.base_url.port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        # engine and worker poll each other meanwhile: with two cores, this process may wait for seconds to go on
        wait_until(lambda: pages_held(http) > 0)
    wait_until(lambda: requests_open(http) == 0 and pages_held(http) == 0)
    # counted once a prompt is read to its end
    assert metric(http, "prompt_tokens_total") == prompts_read
    assert error(reference, short, *complete(client, short, 5)) < TOLERANCE
