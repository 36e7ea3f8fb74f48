"""What surrounds completions: the model's card, health, tokens, metrics, and requests that are refused."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.support.small_model import S, random_prompt
from tests.support.tiny_checkpoint import MODEL, PAGES, encode, metric, options
from vllm_armt.integration.metrics import COUNTERS

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


def test_metrics_count_what_is_read_and_what_is_not_read_again(client, http):
    names = [f"armt_{name}_total" for name in COUNTERS]
    before = {name: metric(http, name) for name in names}
    prompt = random_prompt(5 * S + 3, seed=13)
    for _ in range(2):
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=S, extra_body=options())
    counted = {name.removesuffix("_total"): metric(http, name) - before[name] for name in names}
    assert counted.pop("armt_prefix_memories_evicted") >= 0
    layers = counted.pop("armt_cells") / 5
    assert layers > 1
    assert layers.is_integer()
    assert counted == {
        "armt_segments_read": 5,
        "armt_segments_decoded": 2,
        "armt_prefix_memories_found": 1,
        "armt_prefix_memories_missed": 1,
        "armt_prefix_tokens_not_read": 5 * S,
    }


def test_the_log_begins_with_what_is_served_and_what_a_request_takes(http, log_path: Path):
    """Three pages; the pool has one more than requests can have."""
    (line,) = [line for line in log_path.read_text(errors="replace").splitlines() if "Serving armt on llama" in line]
    size = metric(http, "armt_request_bytes") / 1e3
    for words in (
        "segments of S = 16 tokens with m = 4 memory tokens, schedule 'auto', attention 'sdpa'.",
        f"A request takes {size:,.1f} kB of cache, however long its text is (3 pages of {size / 3:,.1f} kB).",
        f"{(PAGES - 1) // 3} requests fit at a time, and --max-num-seqs lets 8 run",
        f"Memories are kept in {log_path.parent / 'memories'}.",
        "steps do not overlap here",
    ):
        assert words in line


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
