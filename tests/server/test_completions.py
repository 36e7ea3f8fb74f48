"""Completions over HTTP: the reference model's tokens and probabilities, and the API's options."""

from __future__ import annotations

import pytest
import torch

from tests.support.golden_cases import relative_l2
from tests.support.small_model import VOCAB, S, log_probs, random_prompt
from tests.support.tiny_checkpoint import (
    CHARACTERS,
    MODEL,
    TOLERANCE,
    is_greedy,
    options,
    random_text,
    served_log_probs,
)

pytestmark = pytest.mark.server

PROMPT = random_prompt(12 * S + 7)


def complete(client, **request):
    """A completion of `PROMPT`, greedy unless told otherwise."""
    extra = options(return_token_ids=True) | request.pop("extra_body", {})
    defaults = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    return client.completions.create(**defaults | request, extra_body=extra)


@pytest.fixture(scope="module")
def greedy(client):
    return complete(client)


@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 12 * S, 50 * S + 5])
def test_greedy_tokens_are_the_references(client, reference, length):
    prompt = random_prompt(length, seed=length)
    (choice,) = complete(client, prompt=prompt, max_tokens=2 * S).choices
    assert len(choice.token_ids) == 2 * S
    assert is_greedy(reference, prompt, choice.token_ids)
    assert choice.finish_reason == "length"


def test_log_probabilities_are_the_references(client, reference):
    (choice,) = complete(client, logprobs=VOCAB, extra_body={"return_tokens_as_token_ids": True}).choices
    expected = log_probs(reference, PROMPT + choice.token_ids)[len(PROMPT) - 1 :]
    served = served_log_probs(choice.logprobs.top_logprobs)
    assert relative_l2(served, expected) < TOLERANCE
    assert choice.logprobs.token_logprobs == pytest.approx(served.max(dim=-1).values.tolist())


def test_log_probabilities_of_the_prompt_are_the_references(client, reference):
    (choice,) = complete(client, max_tokens=1, extra_body={"prompt_logprobs": VOCAB}).choices
    first, *served = choice.prompt_logprobs
    assert first is None
    actual = torch.tensor([[position[str(token)]["logprob"] for token in range(VOCAB)] for position in served])
    assert relative_l2(actual, log_probs(reference, PROMPT)) < TOLERANCE


def test_echo_puts_the_prompt_and_its_log_probabilities_first(client, reference, greedy):
    prompt = "".join(CHARACTERS[token] for token in PROMPT)
    # asked for token ids, vLLM leaves the prompt's text out
    extra = {"return_token_ids": False}
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=1, extra_body=extra).choices
    assert choice.text == prompt + greedy.choices[0].text
    tokens = torch.tensor(PROMPT + greedy.choices[0].token_ids)
    expected = log_probs(reference, tokens.tolist()).gather(1, tokens[1:, None]).squeeze(1)
    first, *served = choice.logprobs.token_logprobs
    assert first is None
    assert relative_l2(torch.tensor(served), expected) < TOLERANCE


def test_text_and_token_ids_mean_the_same(client, greedy):
    text = "".join(CHARACTERS[token] for token in PROMPT)
    assert complete(client, prompt=text).choices[0].text == greedy.choices[0].text


def test_usage_counts_the_clients_tokens_and_no_memory_tokens(greedy):
    usage = greedy.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(PROMPT), 24, len(PROMPT) + 24)


def test_a_stream_gives_the_same_text_and_usage(client, greedy):
    *events, last = complete(client, stream=True, stream_options={"include_usage": True})
    assert len(events) > 10
    assert "".join(event.choices[0].text for event in events) == greedy.choices[0].text
    assert events[-1].choices[0].finish_reason == "length"
    counts = [
        (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in (last.usage, greedy.usage)
    ]
    assert (last.choices, counts[0]) == ([], counts[1])


def test_a_stop_string_ends_the_text_before_it(client, greedy):
    text = greedy.choices[0].text
    stop = text[S + 1 : S + 3]
    (choice,) = complete(client, stop=[stop]).choices
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_several_choices_are_sampled_for_a_prompt(client):
    completion = complete(client, n=3, temperature=1)
    assert len({tuple(choice.token_ids) for choice in completion.choices}) == 3
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(PROMPT), 3 * 24)


def test_several_prompts_are_answered_in_order(client, greedy):
    short = random_prompt(5)
    many = complete(client, prompt=[PROMPT, short])
    assert [choice.token_ids for choice in many.choices] == [
        greedy.choices[0].token_ids,
        complete(client, prompt=short).choices[0].token_ids,
    ]


@pytest.mark.parametrize("length", [S + 1, 12 * S + 7])
def test_equal_seeds_give_equal_samples(client, length):
    prompt = random_text(length, seed=3)
    first, second, other = (complete(client, prompt=prompt, temperature=1, seed=seed) for seed in (7, 7, 8))
    assert first.choices[0].token_ids == second.choices[0].token_ids
    assert first.choices[0].token_ids != other.choices[0].token_ids
