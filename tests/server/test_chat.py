"""Chat completions: the template's text, streaming, and conversations of several turns."""

from __future__ import annotations

import pytest

from tests.support.small_model import S
from tests.support.tiny_checkpoint import MODEL, encode, is_greedy, metric, options, random_text, rendered

pytestmark = pytest.mark.server

QUESTION = {"role": "user", "content": random_text(7 * S, seed=1)}


def ask(client, messages, **request):
    """A greedy answer of 20 tokens."""
    extra = options(return_token_ids=True)
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=20, temperature=0, extra_body=extra, **request
    )


def test_an_answer_continues_the_templates_text(client, reference):
    answer = ask(client, [QUESTION])
    prompt = encode(rendered([QUESTION]))
    assert is_greedy(reference, prompt, answer.choices[0].token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)


def test_a_streamed_answer_is_the_same(client):
    events = list(ask(client, [QUESTION], stream=True))
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == ask(client, [QUESTION]).choices[0].message.content
    assert events[-1].choices[0].finish_reason == "length"


def test_a_conversation_reads_only_what_is_new(client, reference, http):
    messages = [{"role": "system", "content": random_text(3 * S, seed=2)}, QUESTION]
    known = 0
    for turn in range(3):
        hits = metric(http, "prefix_cache_hits_total")
        answer = ask(client, messages).choices[0]
        prompt = encode(rendered(messages))
        assert is_greedy(reference, prompt, answer.token_ids)
        # the last segment that the turn before closed, or the one before it, is found
        assert metric(http, "prefix_cache_hits_total") - hits >= (known // S - 1) * S
        known = len(prompt)
        messages += [
            {"role": "assistant", "content": answer.message.content},
            {"role": "user", "content": random_text(S, seed=turn)},
        ]


def test_log_probabilities_come_with_an_answer(client):
    (choice,) = ask(client, [QUESTION], logprobs=True, top_logprobs=3).choices
    assert [position.token for position in choice.logprobs.content] == list(choice.message.content)
    for position in choice.logprobs.content:
        assert len(position.top_logprobs) == 3
        assert position.top_logprobs[0].logprob == position.logprob
