"""The transformers models compute what the authors' code computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from tests.support.golden_cases import ALL, SETTINGS, Golden, relative_l2
from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM

Load = Callable[..., RecurrentForCausalLM]

STATE_TOLERANCE = 2e-4
"""Relative L2 of what flows; like the logits', but the goldens state no noise for it."""

BFLOAT16_TOLERANCE = 0.05
"""Relative L2 of row-centred logits. The authors kept M and z in bfloat16, we keep them in float32: 0.027 measured."""


def goldens(cases: list[Golden] = ALL, *, dtype: str = "float32", having: str = "logits") -> pytest.MarkDecorator:
    """Parametrise by goldens of a dtype that have something of this name."""
    chosen = [golden for golden in cases if golden.dtype == dtype and golden.having(having)]
    return pytest.mark.parametrize("golden", chosen, ids=lambda golden: golden.name)


def under_settings(name: str, settings: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise by those goldens in float32 that have something of this name under one of the settings."""
    float32 = [golden for golden in ALL if golden.dtype == "float32"]
    chosen = [
        pytest.param(golden, setting, id=f"{setting}{golden.name}")
        for setting in settings
        for golden in float32
        if golden.having(f"{setting}{name}")
    ]
    return pytest.mark.parametrize(("golden", "setting"), chosen)


@torch.no_grad()
def read(model: RecurrentForCausalLM, prompt: Tensor) -> tuple[Tensor, RecurrentCache]:
    output = model(prompt[None], use_cache=True)
    return output.logits[0], output.past_key_values


@torch.no_grad()
def decode(model: RecurrentForCausalLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits from which each of `tokens` was chosen, fed one at a time."""
    logits, cache = read(model, prompt)
    steps = [logits[-1]]
    for token in tokens[:-1]:
        steps.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(steps)


def flows(cache: RecurrentCache) -> dict[str, Tensor]:
    """What flows into the next segment, by the goldens' names; batch row 0."""
    state = {f"W_mem.{layer}": M[0] for layer, M in cache.M.items()}
    state |= {f"z.{layer}": z[0] for layer, z in cache.z.items()}
    state |= {f"mem.{layer}": memory[0] for layer, memory in cache.memory.items()}
    if cache.memory:
        state["memory_state"] = cache.memory[max(cache.memory)][0]
    if cache.window is not None:
        state |= {f"cache_k.{i}": layer.keys[0] for i, layer in enumerate(cache.window.layers)}
        state |= {f"cache_v.{i}": layer.values[0] for i, layer in enumerate(cache.window.layers)}
    return state


def assert_state(cache: RecurrentCache, golden: Golden, prefix: str) -> None:
    state = flows(cache)
    expected = {k.removeprefix(f"{prefix}."): v for k, v in golden.tensors.items() if k.startswith(f"{prefix}.")}
    for name, tensor in expected.items():
        assert relative_l2(state[name], tensor.view_as(state[name])) < STATE_TOLERANCE, name


@goldens()
def test_logits_of_every_token(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i, prompt in enumerate(golden.prompts):
        assert relative_l2(read(model, prompt)[0], golden.logits(i)) < golden.tolerance(i)


@under_settings("logits", SETTINGS)
def test_logits_under_another_setting(golden: Golden, setting: str, load: Load) -> None:
    model = load(golden, **SETTINGS[setting])
    for i in golden.having(f"{setting}logits"):
        logits = read(model, golden.prompts[i])[0]
        assert relative_l2(logits, golden.logits(i, setting)) < golden.tolerance(i)
        assert relative_l2(logits, golden.logits(i)) > 1e-2


@goldens(having="at_generate")
def test_state_while_the_last_segment_is_open(golden: Golden, load: Load) -> None:
    for i in golden.having("at_generate"):
        assert_state(read(load(golden), golden.prompts[i])[1], golden, f"at_generate.{i}")


@goldens(having="final")
def test_state_after_the_last_segment_was_written_too(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i in golden.having("final"):
        cache = read(model, golden.prompts[i])[1]
        with torch.no_grad():
            model.close_segment(cache)
        assert_state(cache, golden, f"final.{i}")


@goldens(having="noalias.final")
def test_state_of_the_intended_recurrence(golden: Golden, load: Load) -> None:
    model = load(golden, **SETTINGS["noalias."])
    for i in golden.having("noalias.final"):
        cache = read(model, golden.prompts[i])[1]
        with torch.no_grad():
            model.close_segment(cache)
        assert_state(cache, golden, f"noalias.final.{i}")


@goldens(having="gen_logits")
def test_decode_logits_by_teacher_forcing(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i in golden.generations:
        logits = decode(model, golden.prompts[i], golden.tensors[f"gen_tokens.{i}"].long())
        assert relative_l2(logits, golden.tensors[f"gen_logits.{i}"]) < golden.tolerance(i)


@under_settings("gen_tokens", ["", *SETTINGS])
def test_greedy_generate_gives_the_authors_tokens(golden: Golden, setting: str, load: Load) -> None:
    model = load(golden, **SETTINGS.get(setting, {}))
    for i in golden.having(f"{setting}gen_tokens"):
        expected = golden.tensors[f"{setting}gen_tokens.{i}"].long()
        prompt = golden.prompts[i]
        tokens = model.generate(prompt[None], max_new_tokens=len(expected), do_sample=False)[0, len(prompt) :]
        assert tokens.tolist() == expected.tolist()


@goldens(having="gen_committed")
def test_state_at_the_last_decode_step(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i in golden.having("gen_committed"):
        text = torch.cat([golden.prompts[i], golden.tensors[f"gen_tokens.{i}"][:-1].long()])
        assert_state(read(model, text)[1], golden, f"gen_committed.{i}")


@goldens(dtype="bfloat16")
def test_bfloat16_agrees_with_the_authors_up_to_their_state_dtype(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i, prompt in enumerate(golden.prompts):
        assert_close_in_bfloat16(read(model, prompt)[0], golden.logits(i))
    for i in golden.generations:
        logits = decode(model, golden.prompts[i], golden.tensors[f"gen_tokens.{i}"].long())
        assert_close_in_bfloat16(logits, golden.tensors[f"gen_logits.{i}"])


def assert_close_in_bfloat16(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.float(), expected.float()
    centred = [logits - logits.mean(dim=-1, keepdim=True) for logits in (actual, expected)]
    assert relative_l2(*centred) < BFLOAT16_TOLERANCE
    assert (actual.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean() > 0.9
