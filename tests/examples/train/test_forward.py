"""The forward pass: the loss is the one that is said, and gradients reach as far as they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_armt.hf  # noqa: F401  (registers the model)
from examples.train.batches import Batches
from examples.train.carried import cut_off
from examples.train.forward import HEADS, Counts, forward
from examples.train.recipe import Stage
from examples.train.streams import NONE, Streams, classes
from tests.support.tiny_recipe import STAGE
from vllm_armt.babilong import Background

TASKS = {"qa1": 0.3, "qa2": 0.7}
LAYERS = {"topics": 1, "inferences": 0, "begun": 1}


class Start:
    step = level = 0


@pytest.fixture
def model(start):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(start)
    # a fresh memory writes nothing
    for name, parameter in model.named_parameters():
        if "W_mv" in name:
            nn.init.normal_(parameter, std=0.2)
    heads = {kind: nn.Linear(32, len(names)) for kind, names in classes(TASKS).items()}
    model.add_module(HEADS, nn.ModuleDict(heads))
    return model


@pytest.fixture
def batch(start, books):
    tokenizer = AutoTokenizer.from_pretrained(start)
    streams = Streams(tokenizer, Background.of_directory(books / "train", tokenizer), TASKS, "train")
    batch = Batches(streams, Stage(**STAGE | {"tasks": TASKS}), Start(), "s").batch("1", 1)
    del batch["level"], batch["carries"]
    return batch


def test_the_loss_is_that_of_all_logits_at_the_targets(model, batch) -> None:
    found = forward(model, model, batch)
    logits = model(input_ids=batch["ids"]).logits
    assert logits.shape[:2] == batch["ids"].shape
    each = F.cross_entropy(logits.mT, batch["targets"], reduction="none", ignore_index=NONE)
    assert found.loss.item() == pytest.approx((each * batch["weights"]).sum().item(), rel=1e-5)
    answers = batch["distances"] != NONE
    right = (logits.argmax(-1) == batch["targets"]) & answers
    cross, cut = batch["distances"] > 0, batch["cuts"] == 1
    kinds = (answers & ~cross, answers & cross, answers & cut)
    assert Counts(*found.counts.tolist()) == tuple(n for kind in kinds for n in ((right & kind).sum(), kind.sum()))
    assert found.cache is None


@pytest.mark.parametrize("kind", LAYERS)
def test_an_auxiliary_head_reads_its_layer_where_it_is_asked(model, batch, kind: str) -> None:
    outputs = []
    layer = model.model.model.layers[LAYERS[kind]]
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output[:, :32]))
    found = forward(model, model, batch, LAYERS).auxiliary
    handle.remove()
    # three segments close with memory tokens behind them, the last one does not
    hidden = torch.cat(outputs, dim=1)
    logits = model.get_submodule(f"{HEADS}.{kind}")(hidden)
    wanted = F.cross_entropy(logits.mT, batch[kind], reduction="sum", ignore_index=NONE)
    assert (batch[kind] != NONE).any()
    assert found.keys() == LAYERS.keys()
    assert found[kind].item() == pytest.approx(wanted.item(), rel=1e-5)
    delattr(model, HEADS)
    assert forward(model, model, batch).auxiliary == {}
    assert model(input_ids=batch["ids"]).logits.shape[:2] == batch["ids"].shape


def test_the_size_is_that_of_the_memories_that_are_left(model, batch) -> None:
    found = forward(model, model, batch, use_cache=True)
    assert found.cache is not None
    norms = torch.stack([M.flatten(1).norm(dim=1) for M in found.cache.M.values()])
    assert norms.shape == (2, len(batch["ids"]))
    assert found.size.item() == pytest.approx((1 + norms**2).log().mean().item(), rel=1e-5)
    found.size.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for name, p in model.named_parameters() if "W_mv" in name)
    assert forward(model, model, batch).size.item() == 0


def gradient(model, batch, step: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the answers' loss, with memories cut off after every `step` tokens."""
    model.zero_grad()
    T = batch["ids"].shape[1]
    state: dict[str, Any] = {}
    for begin in range(0, T, step or T):
        part = {name: x[:, begin : begin + (step or T)] for name, x in batch.items()}
        goes_on = begin + (step or T) < T
        outcome = forward(model, model, part, use_cache=goes_on, **state)
        outcome.loss.backward()
        if goes_on:
            state = {"past_key_values": cut_off(model, outcome.cache)}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_truncated_gradients_are_those_of_a_memory_that_is_given(model, batch) -> None:
    whole, halves, single = (gradient(model, batch, step) for step in (None, 64, 32))
    loss = forward(model, model, batch).loss.item()
    state: dict[str, Any] = {}
    total = 0.0
    for begin in range(0, 128, 32):
        part = {name: x[:, begin : begin + 32] for name, x in batch.items()}
        outcome = forward(model, model, part, use_cache=begin < 96, **state)
        total += outcome.loss.item()
        if begin < 96:
            state = {"past_key_values": cut_off(model, outcome.cache)}
    # the forward pass is the same however it is cut
    assert total == pytest.approx(loss, rel=1e-5)
    values = [name for name in whole if "W_mv" in name]
    assert values
    for name in values:
        # what a segment writes is read in later ones only
        assert whole[name].norm() > 0
        assert halves[name].norm() > 0
        assert not torch.allclose(whole[name], halves[name])
        assert name not in single or single[name].norm() == 0


def test_stretches_of_the_whole_length_change_nothing(model, batch) -> None:
    one, other = gradient(model, batch, None), gradient(model, batch, 128)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_diagonal_order_gives_the_same_losses_and_gradients(model, batch) -> None:
    model.double()
    outcomes, gradients = [], []
    for schedule in ("sequential", "diagonal"):
        model.zero_grad()
        outcome = forward(model, model, batch, LAYERS, schedule=schedule)
        (outcome.loss + sum(outcome.auxiliary.values())).backward()
        outcomes.append(outcome)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    one, other = outcomes
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    for kind in LAYERS:
        assert other.auxiliary[kind].item() == pytest.approx(one.auxiliary[kind].item(), rel=1e-6) != 0
    assert torch.equal(other.counts, one.counts)
    assert gradients[1].keys() == gradients[0].keys()
    assert {f"{HEADS}.{kind}.weight" for kind in LAYERS} <= gradients[0].keys()
    assert all(torch.allclose(gradients[1][name], x, rtol=1e-5, atol=1e-7) for name, x in gradients[0].items())
