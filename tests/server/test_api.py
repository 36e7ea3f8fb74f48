"""What surrounds completions: the model's card, health, tokens, metrics, and requests that are refused."""

from __future__ import annotations

import openai
import pytest

from tests.support.small_model import S, random_prompt
from tests.support.tiny_checkpoint import MODEL, encode, metric, options

pytestmark = pytest.mark.server


def test_the_model_is_listed_with_a_length_of_a_million_tokens(client):
    (card,) = client.models.list()
    assert (card.id, card.max_model_len) == (MODEL, 1_048_576)


def test_texts_are_turned_into_tokens_and_back(http):
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "two\nlines"}).json()["tokens"]
    assert tokens == encode("two\nlines")
    text = http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
    assert text == "two\nlines"


def test_a_prompt_sent_twice_counts_as_hits_of_the_prefix_cache(client, http):
    prompt = random_prompt(5 * S + 3, seed=11)
    before = {name: metric(http, name) for name in ("prefix_cache_queries_total", "prefix_cache_hits_total")}
    for _ in range(2):
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body=options())
    assert metric(http, "prefix_cache_queries_total") - before["prefix_cache_queries_total"] == 2 * len(prompt)
    assert metric(http, "prefix_cache_hits_total") - before["prefix_cache_hits_total"] == 5 * S


def test_a_prompt_longer_than_the_limit_is_refused_with_both_lengths(http):
    # one token a character; as text, since a million token ids are slow to parse
    request = {"model": MODEL, "prompt": "a" * 1_048_577, "max_tokens": 1}
    response = http.post("/v1/completions", json=request)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "1048576" in message
    assert "1048577" in message


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": [1, 500]}, "500"),
        ({"prompt": []}, "prompt"),
        ({"logprobs": -3}, "logprobs"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(client, wrong, named):
    with pytest.raises(openai.BadRequestError, match=named):
        client.completions.create(**{"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 1} | wrong)


def test_a_model_of_another_name_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="another"):
        client.completions.create(model="another", prompt="a", max_tokens=1)
