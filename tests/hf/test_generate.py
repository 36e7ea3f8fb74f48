"""transformers' `generate` under both policies for a segment that generation fills."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.golden_cases import relative_l2
from tests.support.small_hf import KINDS, S, by_name, text
from vllm_armt.hf import ARMTForCausalLM, RecurrentCache, RecurrentForCausalLM

Model = RecurrentForCausalLM


def greedy(model: Model, ids: Tensor, n: int, **kwargs: object) -> tuple[Tensor, Tensor, RecurrentCache]:
    """New tokens `[B, n]`, their logits `[B, n, V]`, and the state."""
    out = model.generate(
        ids, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), out.past_key_values


class TestCommit:
    @pytest.mark.parametrize("length", [3, 2 * S])
    def test_it_is_forward_over_the_whole_text(self, model: Model, length: int) -> None:
        ids = text(length)
        tokens, logits, cache = greedy(model, ids, 2 * S + 3)
        with torch.no_grad():
            expected = model(torch.cat([ids, tokens], dim=1)).logits[:, length - 1 : -1]
        assert relative_l2(logits, expected) < 1e-4
        assert cache.segments == (length + 2 * S + 3 - 2) // S

    def test_without_a_cache_the_text_is_read_again_each_step(self, model: Model) -> None:
        ids = text(S + 2)
        assert torch.equal(greedy(model, ids, S)[0], model.generate(ids, max_new_tokens=S, use_cache=False)[:, S + 2 :])

    def test_a_batch_generates_what_its_rows_do(self, model: Model) -> None:
        ids = torch.cat([text(10), text(10).flip(1)])
        together = greedy(model, ids, S + 2)[0]
        assert torch.equal(together[1:], greedy(model, ids[1:], S + 2)[0])

    def test_beam_search_reorders_the_state(self, model: Model) -> None:
        settings = {"max_new_tokens": 2 * S, "num_beams": 3, "do_sample": False}
        cached = model.generate(text(10), **settings)
        assert torch.equal(cached, model.generate(text(10), use_cache=False, **settings))

    def test_a_returned_state_is_continued_by_the_next_turn(self, model: Model) -> None:
        first = model.generate(text(10), max_new_tokens=S, do_sample=False, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, text(5)], dim=1)
        continued = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
        assert torch.equal(continued, model.generate(turn, max_new_tokens=4, do_sample=False))


class TestOpen:
    @pytest.mark.parametrize(
        ("length", "alignment"), [(3, "left"), (2 * S, "left"), (2 * S + 3, "right"), (2 * S + 3, "center")]
    )
    def test_the_last_segment_of_the_prompt_stays_open(self, model: Model, length: int, alignment: str) -> None:
        ids, n = text(length), 2 * S + 3
        model.config.generation_policy, model.config.segment_alignment = "open", alignment
        tokens, logits, cache = greedy(model, ids, n)
        closed = model.config.segmentation(length).begin(cache.segments)
        assert (cache.segments, cache.open_tokens) == ((length - 1) // S, length - closed + n - 1)
        with torch.no_grad():
            state = None
            if closed:
                state = model(ids[:, :closed], use_cache=True).past_key_values
                model.close_segment(state)
            rest = torch.cat([ids, tokens], dim=1)[:, closed:-1]
            expected = model(rest, past_key_values=state, stay_open=True).logits[:, -n:]
        assert relative_l2(logits, expected) < 1e-4

    def test_it_needs_the_cache(self, model: Model) -> None:
        model.config.generation_policy = "open"
        with pytest.raises(ValueError, match="use_cache=True"):
            model.generate(text(5), max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("model", [kind for kind in KINDS if kind.backbone == "gpt2"], indirect=True, ids=by_name)
def test_a_text_beyond_the_learned_positions_is_refused(model: Model) -> None:
    # one segment may fill them where they restart; where they grow, memory tokens take some
    restarts = model.config.position_limit is None
    limit = model.config.max_open_tokens if restarts else model.config.position_limit
    with torch.no_grad():
        model(text(limit), stay_open=restarts)
        with pytest.raises(ValueError, match="learned positions, but the base model has 128"):
            model(text(limit + 1), stay_open=restarts)


def test_prompts_of_unequal_length_are_refused(armt: ARMTForCausalLM) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match="equal length"):
        armt.generate(text(5).repeat(2, 1), attention_mask=mask, max_new_tokens=1)


def test_it_stops_after_eos(armt: ARMTForCausalLM) -> None:
    ids = text(10)
    tokens = greedy(armt, ids, 6)[0][0].tolist()
    stopped = armt.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokens[0], pad_token_id=0)
    assert stopped[0, 10:].tolist() == tokens[:1]


def test_sampling_follows_the_seed(armt: ARMTForCausalLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return armt.generate(text(10), max_new_tokens=12, do_sample=True, num_return_sequences=2).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]
