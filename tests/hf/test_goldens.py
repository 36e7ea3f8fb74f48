"""The transformers model computes what the authors' code computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_cases import ALL, Golden, relative_l2
from torch import Tensor

from vllm_armt.hf import ARMTCache, ARMTForCausalLM

Load = Callable[[Golden], ARMTForCausalLM]

FLOAT32 = [golden for golden in ALL if golden.dtype == "float32"]
BFLOAT16 = [golden for golden in ALL if golden.dtype == "bfloat16"]

STATE_TOLERANCE = 2e-4
"""Relative L2 of M and z; like the logits', but the goldens state no noise for them."""

BFLOAT16_TOLERANCE = 0.05
"""Relative L2 of row-centred logits. The authors kept M and z in bfloat16, we keep them in float32: 0.027 measured."""

by_name = pytest.mark.parametrize("golden", FLOAT32, ids=lambda golden: golden.name)
by_name_bfloat16 = pytest.mark.parametrize("golden", BFLOAT16, ids=lambda golden: golden.name)


@torch.no_grad()
def read(model: ARMTForCausalLM, prompt: Tensor) -> tuple[Tensor, ARMTCache]:
    output = model(prompt[None], use_cache=True)
    return output.logits[0], output.past_key_values


@torch.no_grad()
def decode(model: ARMTForCausalLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits from which each of `tokens` was chosen, fed one at a time."""
    logits, cache = read(model, prompt)
    steps = [logits[-1]]
    stay_open = model.config.generation_policy == "open"
    for token in tokens[:-1]:
        steps.append(model(token.view(1, 1), past_key_values=cache, stay_open=stay_open).logits[0, -1])
    return torch.stack(steps)


def assert_state(cache: ARMTCache, golden: Golden, prefix: str) -> None:
    for layer, M in cache.M.items():
        assert relative_l2(M[0], golden.tensors[f"{prefix}.W_mem.{layer}"].view_as(M[0])) < STATE_TOLERANCE
        if f"{prefix}.z.{layer}" in golden.tensors:
            z = cache.z[layer][0]
            assert relative_l2(z, golden.tensors[f"{prefix}.z.{layer}"].view_as(z)) < STATE_TOLERANCE


def generations(golden: Golden) -> list[int]:
    return [i for i in range(len(golden.prompts)) if f"gen_tokens.{i}" in golden.tensors]


def states(golden: Golden, prefix: str) -> list[int]:
    return [i for i in range(len(golden.prompts)) if any(k.startswith(f"{prefix}.{i}.") for k in golden.tensors)]


@by_name
def test_logits_of_every_token(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i, prompt in enumerate(golden.prompts):
        assert relative_l2(read(model, prompt)[0], golden.logits(i)) < golden.tolerance(i)


@pytest.mark.parametrize("golden", [g for g in FLOAT32 if g.name != "armtv2_llama"], ids=lambda golden: golden.name)
def test_memory_while_the_last_segment_is_open(golden: Golden, load: Load) -> None:
    assert states(golden, "at_generate")
    for i in states(golden, "at_generate"):
        assert_state(read(load(golden), golden.prompts[i])[1], golden, f"at_generate.{i}")


@by_name
def test_memory_after_the_last_segment_was_written_too(golden: Golden, load: Load) -> None:
    model = load(golden)
    assert states(golden, "final")
    for i in states(golden, "final"):
        cache = read(model, golden.prompts[i])[1]
        with torch.no_grad():
            model.close_segment(cache)
        assert_state(cache, golden, f"final.{i}")


@by_name
def test_decode_logits_by_teacher_forcing(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i in generations(golden):
        logits = decode(model, golden.prompts[i], golden.tensors[f"gen_tokens.{i}"].long())
        assert relative_l2(logits, golden.tensors[f"gen_logits.{i}"]) < golden.tolerance(i)


@by_name
def test_greedy_generate_gives_the_authors_tokens(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i in generations(golden):
        expected = golden.tensors[f"gen_tokens.{i}"].long()
        prompt = golden.prompts[i]
        tokens = model.generate(prompt[None], max_new_tokens=len(expected), do_sample=False)[0, len(prompt) :]
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("golden", [g for g in FLOAT32 if g.is_hf], ids=lambda golden: golden.name)
def test_memory_at_the_last_decode_step(golden: Golden, load: Load) -> None:
    model = load(golden)
    assert states(golden, "gen_committed")
    for i in states(golden, "gen_committed"):
        text = torch.cat([golden.prompts[i], golden.tensors[f"gen_tokens.{i}"][:-1].long()])
        assert_state(read(model, text)[1], golden, f"gen_committed.{i}")


@by_name_bfloat16
def test_bfloat16_agrees_with_the_authors_up_to_their_state_dtype(golden: Golden, load: Load) -> None:
    model = load(golden)
    for i, prompt in enumerate(golden.prompts):
        assert_close_in_bfloat16(read(model, prompt)[0], golden.logits(i))
    for i in generations(golden):
        logits = decode(model, golden.prompts[i], golden.tensors[f"gen_tokens.{i}"].long())
        assert_close_in_bfloat16(logits, golden.tensors[f"gen_logits.{i}"])


def assert_close_in_bfloat16(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.float(), expected.float()
    centred = [logits - logits.mean(dim=-1, keepdim=True) for logits in (actual, expected)]
    assert relative_l2(*centred) < BFLOAT16_TOLERANCE
    assert (actual.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean() > 0.9
