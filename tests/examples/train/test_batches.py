"""Batches: what tokens weigh, and that they depend on the seed, the step and the level alone."""

from __future__ import annotations

import pytest
import torch

from examples.train.batches import Batches
from examples.train.streams import NONE, Streams
from tests.support.tiny_recipe import stage
from vllm_armt.babilong import task_named


class Start:
    step = level = 0


def test_batches_weigh_answers_and_text_and_come_again_the_same(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    batches = Batches(streams, stage(language_weight=0.5, language_share=0.3), Start(), "seed")
    batch = batches.batch("x", 1)
    ids, answers, targets, weights = (batch[name] for name in ("ids", "answers", "targets", "weights"))
    assert ids.shape == (4, 128)
    is_answer = answers != NONE
    assert (targets[is_answer] == answers[is_answer]).all()
    assert weights[is_answer].sum() == pytest.approx(1)
    text = (targets != NONE) & ~is_answer
    assert weights[text].sum() == pytest.approx(0.5)
    assert 0.2 < text.float().mean() < 0.4
    assert (targets[:, :-1][text[:, :-1]] == ids[:, 1:][text[:, :-1]]).all()
    assert not text[:, -1].any()
    assert (weights[targets == NONE] == 0).all()
    again = batches.batch("x", 1)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    first, second = iter(batches), iter(Batches(streams, batches.stage, Start(), "other"))
    assert not torch.equal(next(first)["ids"], next(second)["ids"])


def test_the_batches_of_one_step_differ_and_do_not_depend_on_those_before(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    progress = Start()
    batches = iter(Batches(streams, stage(), progress, "seed"))
    first, accumulated = next(batches), next(batches)
    assert not torch.equal(first["ids"], accumulated["ids"])
    progress.step = 5
    fifth = next(batches)
    assert torch.equal(next(iter(Batches(streams, stage(), progress, "seed")))["ids"], fifth["ids"])


def test_shorter_levels_are_mixed_in(tokenizer, background) -> None:
    batches = Batches(Streams(tokenizer, background, [], "train"), stage(shorter=0.5), Start(), "seed")
    levels = [int(batches.batch(str(i), 1)["level"]) for i in range(40)]
    assert 10 < sum(levels) < 30


def test_devices_share_a_batch_of_one_kind(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, [], "train")
    mixed = stage(shorter=0.5, hold=0.5, tokens_per_step=1024)
    both = [Batches(streams, mixed, Start(), "seed", device, 2) for device in range(2)]
    alone = Batches(streams, mixed, Start(), "seed")
    for i in range(10):
        first, second = (batches.batch(str(i), 1) for batches in both)
        assert first["level"] == second["level"] == alone.batch(str(i), 1)["level"]
        assert 2 * len(first["ids"]) == 2 * len(second["ids"]) == len(alone.batch(str(i), 1)["ids"])
        assert not torch.equal(first["ids"], second["ids"])


def test_streams_that_go_on_from_old_memories_ask_nobody_who_may_be_known_there(tokenizer, background) -> None:
    streams = Streams(tokenizer, background, ["qa1"], "train")
    given = stage(unknown=1.0, carry=0.5, hold=0.0)
    batches = Batches(streams, given, Start(), "seed")
    seen = set()
    for step in range(12):
        batch = batches.batch(str(step), 1)
        firsts = batch["answers"][batch["distances"] != NONE]
        # a place is one token here, and "unknown" is not
        is_place = {tokenizer.decode([int(token)]).strip() in task_named("qa1").labels for token in firsts}
        seen.add((bool(batch["carries"]), *is_place))
    assert seen == {(True, True), (False, False)}
