"""Many clients at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from golden_cases import relative_l2
from server.tiny import MODEL, TOLERANCE, metric, options, served_log_probs
from small_model import VOCAB, S, log_probs, random_prompt
from torch import Tensor

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
