"""`output_hidden_states`: the embeddings and every layer's output, as transformers returns them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.golden_cases import relative_l2
from tests.support.small_hf import KINDS, WIDE, S, Small, by_name, text, tiny_base
from vllm_armt.config import BACKBONES
from vllm_armt.hf import ARMTForCausalLM, RecurrentForCausalLM

Model = RecurrentForCausalLM


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return model(ids, output_hidden_states=True, **options).hidden_states


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(relative_l2(one, other) < tolerance for one, other in zip(found, expected, strict=True))


class TestWhatTheyAre:
    @pytest.mark.parametrize("backbone", sorted(BACKBONES))
    def test_within_a_segment_they_are_those_of_the_base_model(self, backbone: str) -> None:
        expected = hidden_states(tiny_base(backbone), text(S, batch=2))
        assert_close(hidden_states(Small("armt", backbone).build(), text(S, batch=2)), expected)

    @torch.no_grad()
    def test_they_are_of_the_tokens_alone_and_the_last_gives_the_logits(self, model: Model) -> None:
        ids = text(3 * S - 2, batch=2)
        output = model(ids, output_hidden_states=True)
        base = model.config.base_model_config
        assert len(output.hidden_states) == base.num_hidden_layers + 1
        assert {tuple(x.shape) for x in output.hidden_states} == {(2, 3 * S - 2, base.hidden_size)}
        assert relative_l2(model.get_output_embeddings()(output.hidden_states[-1]), output.logits) < 1e-6
        assert relative_l2(output.logits, model(ids).logits) < 1e-6

    @torch.no_grad()
    def test_the_first_are_the_embeddings_without_what_was_read_from_the_memory(self, model: Model) -> None:
        ids = text(3 * S)
        embeddings = model.get_input_embeddings()(ids)
        if model.config.backbone.positions:
            layout = model.config.segment_layout
            positions = [layout.prefix + segment * layout.stride + i for segment in range(3) for i in range(S)]
            embeddings = embeddings + model.model.get_submodule(model.config.backbone.positions).weight[positions]
        assert_close(hidden_states(model, ids)[:1], (embeddings,))

    @torch.no_grad()
    @pytest.mark.parametrize(
        "model",
        [k for k in KINDS if k.system.startswith("armt")] + [Small("prmt", "gpt2", {"aliased": False})],
        indirect=True,
        ids=by_name,
    )
    def test_those_of_a_layer_are_what_the_model_cut_off_above_it_ends_with(self, model: Model) -> None:
        ids = text(3 * S - 2)
        states = hidden_states(model, ids)
        norm = model.model.get_submodule(model.config.backbone.norm)
        layers = model.model.get_submodule(model.config.backbone.layers)
        for i in reversed(range(1, len(layers))):
            layers[i].forward = lambda hidden_states, *args, **kwargs: hidden_states
            # one layer less has run
            assert relative_l2(norm(states[i]), hidden_states(model, ids)[-1]) < 1e-5


class TestCalls:
    def test_any_cut_into_calls_gives_the_same(self, model: Model) -> None:
        ids = text(29)
        whole = hidden_states(model, ids)
        cache: Any = None
        parts = []
        with torch.no_grad():
            for chunk in ids.tensor_split([1, S, S + 3, 20], dim=1):
                output = model(chunk, past_key_values=cache, use_cache=True, output_hidden_states=True)
                cache = output.past_key_values
                parts.append(output.hidden_states)
        assert_close(tuple(torch.cat(states, dim=1) for states in zip(*parts, strict=True)), whole)

    @pytest.mark.parametrize("tokens", [5, 3 * S - 2])
    @pytest.mark.parametrize("backbone", ["llama", "gpt2", "gpt_neo"])
    def test_both_schedules_give_the_same(self, backbone: str, tokens: int) -> None:
        model, ids = Small("armt", backbone, reach=WIDE).build(), text(tokens, batch=2)
        assert_close(hidden_states(model, ids, schedule="diagonal"), hidden_states(model, ids), 2e-5)

    def test_gradients_flow_through_them(self, model: Model) -> None:
        embeds = model.get_input_embeddings()(text(2 * S)).detach().requires_grad_()
        for states in model(inputs_embeds=embeds, output_hidden_states=True).hidden_states:
            (gradient,) = torch.autograd.grad(states[:, -1].square().sum(), embeds, retain_graph=True)
            assert gradient.norm() > 0

    @pytest.mark.parametrize("model", [k for k in KINDS if not k.has_window], indirect=True, ids=by_name)
    def test_checkpointing_changes_nothing(self, model: Model) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        expected = hidden_states(model.train(), text(2 * S))
        model.gradient_checkpointing_enable()
        output = model(text(2 * S), output_hidden_states=True)
        output.hidden_states[1].sum().backward()
        assert_close(tuple(x.detach() for x in output.hidden_states), expected)

    def test_generation_returns_them_for_every_step(self, armt: ARMTForCausalLM) -> None:
        settings: dict[str, Any] = {"max_new_tokens": S, "do_sample": False, "return_dict_in_generate": True}
        out = armt.generate(text(10), output_hidden_states=True, **settings)
        whole = hidden_states(armt, out.sequences[:, :-1])
        assert [step[0].shape[1] for step in out.hidden_states] == [10] + [1] * (S - 1)
        assert_close(tuple(torch.cat(states, dim=1) for states in zip(*out.hidden_states, strict=True)), whole)


class TestAsking:
    def test_they_are_returned_only_when_asked_for(self, armt: ARMTForCausalLM) -> None:
        assert armt(text(5)).hidden_states is None
        armt.config.output_hidden_states = True
        assert len(armt(text(5)).hidden_states) == 4
        assert armt(text(5), output_hidden_states=False).hidden_states is None

    def test_logits_to_keep_leaves_them_whole(self, armt: ARMTForCausalLM) -> None:
        output = armt(text(20), output_hidden_states=True, logits_to_keep=1)
        assert (output.logits.shape[1], output.hidden_states[0].shape[1]) == (1, 20)

    @torch.no_grad()
    def test_a_tuple_in_place_of_an_output(self, model: Model) -> None:
        ids = text(20)
        logits, states = model(ids, output_hidden_states=True, return_dict=False)
        assert torch.equal(logits, model(ids).logits)
        assert_close(states, hidden_states(model, ids))
        (alone,) = model(ids, return_dict=False)
        assert torch.equal(alone, logits)

    def test_no_hook_is_left_behind(self, armt: ARMTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden_states(armt, text(20))
        monkeypatch.setattr(armt.model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hidden_states(armt, text(20))
        assert not any(module._forward_pre_hooks for module in armt.modules())

    def test_chosen_layers_are_refused(self, armt: ARMTForCausalLM) -> None:
        with pytest.raises(ValueError, match=r"output_hidden_states is \[1, 2\]; allowed: True"):
            armt(text(5), output_hidden_states=[1, 2])

    def test_attention_weights_are_refused(self, model: Model) -> None:
        message = "output_attentions is True, but tokens attend within their segments.*Leave it out"
        with pytest.raises(ValueError, match=message):
            model(text(5), output_attentions=True)
        with pytest.raises(ValueError, match=message):
            model.generate(text(5), output_attentions=True, return_dict_in_generate=True, max_new_tokens=1)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(ValueError, match=message):
            model(text(5))
