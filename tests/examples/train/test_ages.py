"""Memories that have grown old, and what is told to them."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train import ages, validation
from examples.train.ages import READ_AT_ONCE, aged, stage_of
from examples.train.carried import copies
from examples.train.forward import Counts, Outcome
from examples.train.recipe import Validation
from examples.train.streams import Streams
from vllm_armt.babilong import Background

PIECE = READ_AT_ONCE * 32


@pytest.fixture
def model(start):
    """One that writes, which a model from nothing does not."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in model._layers:
        layer.W_mv.weight.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def streams(start, books) -> Streams:
    tokenizer = AutoTokenizer.from_pretrained(start)
    return Streams(tokenizer, Background.of_directory(books / "validation", tokenizer), ["qa1"], "validation")


def test_a_memory_has_read_whole_readings_and_what_one_call_reads(model, streams) -> None:
    stage = stage_of(model, "qa1", mentions=1.0)
    (none, fresh), *found = [
        (age, state and copies(state, 1, model.device)) for age, state in aged(model, streams, stage, [0, 1, 2 * PIECE])
    ]
    assert (none, fresh) == (0, None)
    (once, first), (twice, second) = found
    assert (once, twice) == (PIECE, 2 * PIECE)
    assert first is not None
    assert second is not None
    ids = np.concatenate([streams.text(Random(f"ages/{read}"), stage, PIECE) for read in (0, PIECE)])
    with torch.inference_mode():
        whole = model(torch.from_numpy(ids).long()[None], use_cache=True).past_key_values
        model.close_segment(whole)
    for layer, M in whole.M.items():
        torch.testing.assert_close(second.M[layer], M)
        torch.testing.assert_close(second.z[layer], whole.z[layer])
        assert not torch.equal(first.M[layer], M)


def test_text_to_read_is_of_its_length_tells_nothing_and_has_its_mentions(model, streams) -> None:
    stage = stage_of(model, "qa1", mentions=20.0)
    text, other = (streams.text(Random(seed), stage, PIECE) for seed in (0, 1))
    assert len(text) == len(other) == PIECE
    assert not np.array_equal(text, other)
    said = streams.encode.tokenizer.decode(text)
    assert re.search(r"Daniel|John|Mary|Sandra", said)
    assert not re.search(r"(Daniel|John|Mary|Sandra) (went|moved|journeyed|travelled) (back )?to", said)


def test_copies_leave_the_memory_as_it_was(model) -> None:
    with torch.inference_mode():
        cache = model(torch.randint(700, (1, 64)), use_cache=True).past_key_values
        model.close_segment(cache)
        before = {layer: M.clone() for layer, M in cache.M.items()}
        copied = copies(cache, 3, model.device)
        for layer, M in before.items():
            assert torch.equal(copied.M[layer], M.expand(3, -1, -1, -1))
        model(torch.randint(700, (3, 64)), past_key_values=copied, use_cache=True)
    assert (cache.batch_size, cache.tokens) == (1, 64)
    assert all(torch.equal(cache.M[layer], M) for layer, M in before.items())


def test_every_stream_is_told_to_the_memory_as_it_was_given(model, streams, monkeypatch) -> None:
    stage = stage_of(model, "qa1", mentions=1.0)
    *_, (_, state) = aged(model, streams, stage, [PIECE])
    assert state is not None
    told_to = []

    def answered(model, inner, batch, past_key_values, use_cache) -> Outcome:
        told_to.append(past_key_values.M[1])
        outcome = validation_forward(model, inner, batch, past_key_values=past_key_values, use_cache=use_cache)
        return outcome._replace(counts=torch.tensor(Counts(0, 0, 8, 16, 2, 4)))

    validation_forward = validation.forward
    monkeypatch.setattr(validation, "forward", answered)
    found = validation.accuracy(model, streams, stage, 4, Validation(questions=40), state)
    assert (found["accuracy"], found["answers"], found["cut_right"], found["cut"]) == (0.5, 48, 6, 12)
    assert len(told_to) == 3
    assert all(torch.equal(first, second) for first, second in pairwise(told_to))
    assert torch.equal(told_to[0], state.M[1].expand_as(told_to[0]))


def test_the_table_has_a_row_for_every_age(start, books, monkeypatch, capsys) -> None:
    arguments = ["ages", str(start), "--text", str(books), "--tokens", str(PIECE), "0", "--questions", "8"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setenv("COLUMNS", "200")
    ages.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if "/" in line]
    assert [re.findall(r"[\d,]+", row)[0] for row in rows] == ["0", f"{PIECE:,}"]
    for row in rows:
        shares = [(int(right), int(of)) for right, of in re.findall(r"(\d+)/(\d+)", row)]
        assert all(right <= of for right, of in shares)
        whole, cut, longer, longer_cut = (of for _, of in shares)
        assert min(whole + cut, longer + longer_cut) >= 8


def test_a_reading_that_is_broken_off_prints_what_was_asked(start, books, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ages", str(start), "--text", str(books), "--tokens", "0", str(PIECE), "--questions", "8"]
    )
    monkeypatch.setenv("COLUMNS", "200")

    def text(*_) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(Streams, "text", text)
    with pytest.raises(KeyboardInterrupt):
        ages.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "/" in line]
    assert re.findall(r"[\d,]+", row)[0] == "0"
