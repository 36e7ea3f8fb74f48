"""What the transformers models promise beside the authors' numbers: state, gradients, output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.golden_cases import relative_l2
from tests.support.small_hf import KINDS, S, by_name, text
from vllm_armt.hf import ARMTForCausalLM, RecurrentCache, RecurrentForCausalLM, is_memory
from vllm_armt.hf.modeling_recurrent import RecurrentLayer

Model = RecurrentForCausalLM

without_window = pytest.mark.parametrize("model", [k for k in KINDS if not k.has_window], indirect=True, ids=by_name)
with_window = pytest.mark.parametrize("model", [k for k in KINDS if k.has_window], indirect=True, ids=by_name)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    return model(ids, **kwargs).logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or relative_l2(a, b) < 1e-5


def flows(cache: RecurrentCache) -> list[Tensor]:
    """Everything that flows into the next segment."""
    keys = [] if cache.window is None else [x for layer in cache.window.layers for x in (layer.keys, layer.values)]
    return [*cache.M.values(), *cache.z.values(), *cache.memory.values(), *keys]


class TestState:
    def test_the_first_token_reaches_the_last_segment(self, model: Model) -> None:
        ids = text(3 * S)
        changed = ids.clone()
        changed[0, 0] = (ids[0, 0] + 1) % 256
        assert relative_l2(logits(model, changed)[:, -S:], logits(model, ids)[:, -S:]) > 1e-2

    @torch.no_grad()
    @pytest.mark.parametrize("cuts", [[5], [S, 20], [1, 2, S + 1], list(range(1, 29))])
    def test_any_cut_into_calls_gives_the_same_logits_and_state(self, model: Model, cuts: list[int]) -> None:
        ids = text(29)
        whole = model(ids, use_cache=True)
        cache: Any = None
        parts = []
        for chunk in ids.tensor_split(cuts, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert close(torch.cat(parts, dim=1), whole.logits)
        assert all(close(*states) for states in zip(flows(cache), flows(whole.past_key_values), strict=True))

    def test_no_state_is_returned_unless_asked_for(self, model: Model) -> None:
        assert model(text(20)).past_key_values is None

    def test_a_copied_state_can_be_continued_twice(self, model: Model) -> None:
        with torch.no_grad():
            cache = model(text(20), use_cache=True).past_key_values
        first = logits(model, text(9), past_key_values=copy.deepcopy(cache))
        assert torch.equal(logits(model, text(9), past_key_values=cache), first)

    @torch.no_grad()
    def test_a_closed_partial_segment_is_followed_by_a_new_one(self, model: Model) -> None:
        cache = model(text(S + 3), use_cache=True).past_key_values
        model.close_segment(cache)
        assert (cache.segments, cache.tokens, cache.open_tokens, cache.kv) == (2, S + 3, 0, None)
        assert cache.window_size in (0, 3)
        model(text(S + 1), past_key_values=cache)
        assert (cache.segments, cache.tokens, cache.open_tokens) == (3, 2 * S + 4, 1)

    @torch.no_grad()
    def test_staying_open_is_attending_to_all_of_an_overlong_segment(self, model: Model) -> None:
        ids = text(2 * S + 5)
        whole = model(ids, stay_open=True, use_cache=True)
        assert (whole.past_key_values.segments, whole.past_key_values.open_tokens) == (0, 2 * S + 5)
        cache = model(ids[:, :S], use_cache=True).past_key_values
        rest = model(ids[:, S:], past_key_values=cache, stay_open=True).logits
        assert close(rest, whole.logits[:, S:])
        assert not close(rest, logits(model, ids)[:, S:])

    def test_closing_without_an_open_segment_is_refused(self, model: Model) -> None:
        cache = model(text(3), use_cache=True).past_key_values
        model.close_segment(cache)
        with pytest.raises(ValueError, match="No segment is open"):
            model.close_segment(cache)

    def test_empty_input_is_refused(self, model: Model) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            model(torch.empty(1, 0, dtype=torch.long))

    def test_associative_memory_is_float32_in_a_bfloat16_model(self, armt: ARMTForCausalLM) -> None:
        cache = armt.to(torch.bfloat16)(text(20), use_cache=True).past_key_values
        assert cache.M[0].dtype == cache.z[0].dtype == torch.float32

    def test_every_kind_runs_in_bfloat16(self, model: Model) -> None:
        expected = logits(model, text(20)).log_softmax(-1)
        output = model.to(torch.bfloat16)(text(20), use_cache=True)
        model.close_segment(output.past_key_values)
        assert output.logits.dtype == torch.bfloat16
        assert relative_l2(output.logits.detach().log_softmax(-1), expected) < 0.1

    def test_nothing_of_a_text_is_left_in_the_model(self, model: Model) -> None:
        logits(model, text(20))
        assert not any(hasattr(layer, "call") for layer in model.modules() if isinstance(layer, RecurrentLayer))


class TestPrompts:
    """Where the segments of a prompt lie if they are not counted from its first token."""

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("alignment", "lengths"), [("left", [8, 8, 4]), ("right", [4, 8, 8]), ("center", [7, 7, 6])]
    )
    def test_each_segment_closes_but_the_last(self, model: Model, alignment: str, lengths: list[int]) -> None:
        ids = text(sum(lengths))
        cache: Any = None
        parts = []
        for chunk in ids.split(lengths, dim=1):
            if cache is not None:
                model.close_segment(cache)
            output = model(chunk, past_key_values=cache, use_cache=True, stay_open=True)
            cache = output.past_key_values
            parts.append(output.logits)
        model.config.generation_policy, model.config.segment_alignment = "open", alignment
        assert close(logits(model, ids), torch.cat(parts, dim=1))

    @torch.no_grad()
    def test_tokens_after_the_prompt_belong_to_its_last_segment(self, model: Model) -> None:
        model.config.generation_policy = "open"
        ids, more = text(2 * S), text(S + 2)
        cache = model(ids, use_cache=True).past_key_values
        assert (cache.segments, cache.open_tokens) == (1, S)
        model(more, past_key_values=cache)
        assert (cache.segments, cache.open_tokens) == (1, 2 * S + 2)

    @torch.no_grad()
    def test_a_prompt_may_follow_a_closed_segment(self, model: Model) -> None:
        model.config.generation_policy, model.config.segment_alignment = "open", "right"
        cache = model(text(S + 1), use_cache=True).past_key_values
        assert (cache.segments, cache.open_tokens) == (1, S)
        model.close_segment(cache)
        model(text(S + 3), past_key_values=cache)
        assert (cache.segments, cache.open_tokens, cache.tokens) == (3, S, 2 * S + 4)


class TestBatch:
    def test_rows_are_independent(self, model: Model) -> None:
        ids = text(21, batch=3)
        assert close(logits(model, ids)[1], logits(model, ids[1:2])[0])

    @torch.no_grad()
    def test_reordering_a_state_is_reordering_its_texts(self, model: Model) -> None:
        ids, order = text(21, batch=3), torch.tensor([2, 0, 0])
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(order)
        expected = model(ids[order], use_cache=True).past_key_values
        assert all(close(*states) for states in zip(flows(cache), flows(expected), strict=True))
        assert close(logits(model, ids, past_key_values=cache), logits(model, ids, past_key_values=expected))

    def test_right_padding_leaves_the_logits_of_real_tokens(self, model: Model) -> None:
        ids = text(21, batch=2)
        mask = torch.ones_like(ids)
        mask[0, 13:] = 0
        assert close(logits(model, ids * mask, attention_mask=mask)[0, :13], logits(model, ids[:1, :13])[0])

    def test_left_padding_is_refused(self, model: Model) -> None:
        mask = torch.ones(1, 10, dtype=torch.long)
        mask[0, 0] = 0
        with pytest.raises(ValueError, match="pad on the right"):
            model(text(10), attention_mask=mask)


class TestOutput:
    def test_loss_is_that_of_the_next_token(self, model: Model) -> None:
        ids = text(20)
        output = model(ids, labels=ids)
        expected = nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
        assert torch.allclose(output.loss, expected)

    def test_only_the_last_logits_when_asked(self, model: Model) -> None:
        ids = text(20)
        assert close(logits(model, ids, logits_to_keep=2), logits(model, ids)[:, -2:])

    def test_embeddings_in_place_of_tokens(self, model: Model) -> None:
        ids = text(20)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


class TestGradients:
    def test_they_flow_through_several_segments(self, model: Model) -> None:
        embeds = model.get_input_embeddings()(text(3 * S)).detach().requires_grad_()
        own = {n: p for n, p in model.named_parameters() if is_memory(n)}
        last = model(inputs_embeds=embeds).logits[:, -1].square().sum()
        to_embeds, *to_own = torch.autograd.grad(last, [embeds, *own.values()], allow_unused=True)
        assert to_embeds[:, :S].norm() > 0
        assert [n for n, g in zip(own, to_own, strict=True) if g is None or g.norm() == 0] == []

    @with_window
    def test_they_flow_through_keys_and_values_of_the_segment_before(self, model: Model) -> None:
        embeds = model.get_input_embeddings()(text(S)).detach().requires_grad_()
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
        model.close_segment(cache)
        window = [x for layer in cache.window.layers for x in (layer.keys, layer.values)]
        last = model(text(5), past_key_values=cache).logits.square().sum()
        gradients = torch.autograd.grad(last, [*window, embeds])
        # a window that slides with the rows leaves the first token to none of them behind a sink
        first = model.config.prefix_rows if model.config.window == "rows" else 0
        assert all((gradient.norm(dim=-1)[..., first:] > 0).all() for gradient in gradients)

    @without_window
    def test_checkpointing_changes_nothing(self, model: Model) -> None:
        ids = text(3 * S)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

        def gradients() -> list[Tensor]:
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        model.train()
        plain = gradients()
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
        assert all(close(*pair) for pair in zip(gradients(), plain, strict=True))

    @without_window
    def test_checkpointing_with_a_state_to_keep_is_refused(self, model: Model) -> None:
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="use_cache=False"):
            model(text(9), use_cache=True)

    @with_window
    def test_checkpointing_with_a_window_is_refused(self, model: Model) -> None:
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="a window over the segment before needs: train without it"):
            model(text(9))


class TestAttention:
    def test_implementations_agree(self, model: Model) -> None:
        expected = logits(model, text(29))
        model.set_attn_implementation("eager")
        assert close(logits(model, text(29)), expected)

    @with_window
    def test_flash_attention_cannot_take_a_window(self, model: Model) -> None:
        model.model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
            model(text(9))

    @torch.no_grad()
    @pytest.mark.parametrize("model", [k for k in KINDS if k.system == "armt_sw"], indirect=True, ids=by_name)
    def test_a_token_sees_the_window_from_its_own_place_on(self, model: Model) -> None:
        """With a memory that is never written, token c reaches tokens S to S + c of the second segment.

        Where the window slides with the rows, one of which is the sink, it does not reach token S + c.
        """
        for name, parameter in model.named_parameters():
            if name.endswith("W_mv.weight"):
                nn.init.zeros_(parameter)
        ids = text(2 * S)
        changed = ids.clone()
        changed[0, 1] = (ids[0, 1] + 1) % 256
        # one layer, so that nothing reaches a later token by way of another
        for layer in model.model.get_submodule(model.config.backbone.layers)[1:]:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        moved = (logits(model, changed) - logits(model, ids)).norm(dim=-1)[0, S:]
        reached = 1 if model.config.window == "rows" else 2
        assert (moved[:reached] > 0).all()
        assert not moved[reached:].any()
