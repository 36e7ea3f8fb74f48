"""transformers' `generate` under both policies for a segment that generation fills."""

from __future__ import annotations

import pytest
import torch
from golden_cases import relative_l2
from torch import Tensor

from vllm_armt.hf import ARMTCache, ARMTForCausalLM

S = 8


def prompt(length: int) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length))


def greedy(model: ARMTForCausalLM, ids: Tensor, n: int, **kwargs: object) -> tuple[Tensor, Tensor, ARMTCache]:
    """New tokens `[B, n]`, their logits `[B, n, V]`, and the state."""
    out = model.generate(
        ids, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), out.past_key_values


@pytest.mark.parametrize("length", [3, S, S + 1, 2 * S])
def test_commit_is_forward_over_the_whole_text(armt: ARMTForCausalLM, length: int) -> None:
    ids = prompt(length)
    tokens, logits, cache = greedy(armt, ids, 2 * S + 3)
    with torch.no_grad():
        expected = armt(torch.cat([ids, tokens], dim=1)).logits[:, length - 1 : -1]
    assert relative_l2(logits, expected) < 1e-5
    assert cache.segments == (length + 2 * S + 3 - 2) // S


@pytest.mark.parametrize(("length", "written"), [(3, 0), (S, 0), (S + 1, 1), (2 * S, 1)])
def test_open_keeps_the_last_segment_of_the_prompt_open(armt: ARMTForCausalLM, length: int, written: int) -> None:
    armt.config.generation_policy = "open"
    ids = prompt(length)
    tokens, logits, cache = greedy(armt, ids, 2 * S + 3)
    assert cache.segments == written
    assert cache.open_tokens == length - written * S + 2 * S + 2
    with torch.no_grad():
        cache = armt(ids[:, : written * S + 1], use_cache=True).past_key_values
        rest = torch.cat([ids, tokens], dim=1)[:, written * S + 1 : -1]
        expected = armt(rest, past_key_values=cache, stay_open=True).logits[:, -tokens.shape[1] + 1 :]
    assert relative_l2(logits[:, 1:], expected) < 1e-5


def test_without_a_cache_the_text_is_read_again_each_step(armt: ARMTForCausalLM) -> None:
    ids = prompt(S + 2)
    assert torch.equal(greedy(armt, ids, S)[0], armt.generate(ids, max_new_tokens=S, use_cache=False)[:, S + 2 :])


def test_open_needs_the_cache(armt: ARMTForCausalLM) -> None:
    armt.config.generation_policy = "open"
    with pytest.raises(ValueError, match="use_cache=True"):
        armt.generate(prompt(5), max_new_tokens=2, use_cache=False)


def test_a_batch_generates_what_its_rows_do(armt: ARMTForCausalLM) -> None:
    ids = torch.cat([prompt(10), prompt(10).flip(1)])
    together = greedy(armt, ids, S + 2)[0]
    assert torch.equal(together[1:], greedy(armt, ids[1:], S + 2)[0])


def test_prompts_of_unequal_length_are_refused(armt: ARMTForCausalLM) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match="equal length"):
        armt.generate(prompt(5).repeat(2, 1), attention_mask=mask, max_new_tokens=1)


def test_it_stops_after_eos(armt: ARMTForCausalLM) -> None:
    ids = prompt(10)
    tokens = greedy(armt, ids, 6)[0][0].tolist()
    stopped = armt.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokens[0], pad_token_id=0)
    assert stopped[0, 10:].tolist() == tokens[:1]


def test_sampling_follows_the_seed(armt: ARMTForCausalLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return armt.generate(prompt(10), max_new_tokens=12, do_sample=True, num_return_sequences=2).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]


def test_beam_search_reorders_the_memory(armt: ARMTForCausalLM) -> None:
    settings = {"max_new_tokens": 2 * S, "num_beams": 3, "do_sample": False}
    assert torch.equal(armt.generate(prompt(10), **settings), armt.generate(prompt(10), use_cache=False, **settings))


def test_a_returned_state_is_continued_by_the_next_turn(armt: ARMTForCausalLM) -> None:
    first = armt.generate(prompt(10), max_new_tokens=S, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompt(5)], dim=1)
    continued = armt.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(continued, armt.generate(turn, max_new_tokens=4, do_sample=False))
