"""The diagonal order: it groups, what it computes is what the sequential one does, and it refuses the rest."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.support.golden_cases import relative_l2
from tests.support.small_hf import M_TOKENS, WIDE, S, Small, by_name, text
from vllm_armt.hf import ARMTForCausalLM, RecurrentForCausalLM, diagonal
from vllm_armt.hf.modeling_armt import ARMTLayer

KINDS = [
    Small("armt", "llama"),
    Small("armt", "llama", {"variant": "v1"}),
    Small("armt", "llama", {"use_sink": True, "memory_attention": "full"}),
    Small("armt", "gpt2"),
    Small("armt", "gpt2", {"wrap_pos": True}),
    Small("armt", "gpt2", {"learned_positions": "restart", "generation_policy": "open"}),
    Small("armt", "gpt_neox", {"n_heads": 2, "d_mem": 8}),
    Small("armt", "gpt_neo", {"learned_positions": "restart"}, reach=WIDE),
    Small("armt", "gemma"),
    Small("armt", "mistral"),
    Small("armt", "qwen2", {"n_heads": 2, "d_mem": 8, "gating": True, "use_denom": False}),
    Small("armt", "qwen3", {"correction": False}),
]
FLOAT32_INSIDE = ("gemma", "gpt_neo")
"""Backbones that compute some of it in float32 whatever they are given."""

Gradients = dict[str, Tensor | None]


def run(
    model: RecurrentForCausalLM, ids: Tensor, schedule: Literal["sequential", "diagonal"]
) -> tuple[Tensor, Gradients]:
    """Logits, and gradients of the loss."""
    model.zero_grad()
    output = model(ids, labels=ids, schedule=schedule)
    output.loss.backward()
    return output.logits.detach(), {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_same(model: RecurrentForCausalLM, ids: Tensor, tolerance: float) -> None:
    (expected, gradients), (found, theirs) = run(model, ids, "sequential"), run(model, ids, "diagonal")
    assert relative_l2(found, expected) < tolerance
    for name, gradient in gradients.items():
        other = theirs[name]
        if gradient is None or other is None:
            assert gradient is other, name
        else:
            assert torch.equal(other, gradient) or relative_l2(other, gradient) < tolerance, name


@pytest.fixture
def llama() -> ARMTForCausalLM:
    """A small ARMT of three layers in float64."""
    return Small("armt", "llama").build().double()


class TestResults:
    # one segment short of S, a whole one, fewer than layers, as many, more
    @pytest.mark.parametrize("tokens", [5, S, 2 * S - 3, 3 * S, 6 * S - 1])
    @pytest.mark.parametrize("kind", KINDS, ids=by_name)
    def test_logits_and_all_gradients_are_those_of_the_sequential_order(self, kind: Small, tokens: int) -> None:
        tolerance = 1e-6 if kind.backbone in FLOAT32_INSIDE else 1e-9
        assert_same(kind.build().double(), text(tokens, batch=2), tolerance)

    def test_float32_is_as_exact_as_the_sequential_order(self) -> None:
        # of gradients float32 leaves the fewer digits the longer the text, in either order; how many depends on the CPU
        assert_same(Small("armt", "gpt2").build(), text(2 * S - 3, batch=2), 3e-5)

    def test_attention_with_a_mask_of_each_text(self, llama: ARMTForCausalLM) -> None:
        llama.set_attn_implementation("eager")
        assert_same(llama, text(3 * S, batch=2), 1e-9)

    def test_pads_on_the_right_leave_the_logits_of_real_tokens(self, llama: ARMTForCausalLM) -> None:
        ids = text(21, batch=2)
        mask = torch.ones_like(ids)
        mask[0, 13:] = 0
        with torch.no_grad():
            padded = llama(ids * mask, attention_mask=mask, schedule="diagonal").logits
            alone = llama(ids[:1, :13]).logits
        assert relative_l2(padded[0, :13], alone[0]) < 1e-9

    def test_learned_positions_that_grow_may_end_with_the_text(self) -> None:
        model = Small("armt", "gpt2").build().double()
        tokens = model.config.position_limit
        # the last segment is not full, and those of its rows behind the tokens have no positions
        assert tokens % S
        assert_same(model, text(tokens), 1e-9)
        with pytest.raises(ValueError, match="learned positions"):
            model(text(tokens + 1), schedule="diagonal")

    def test_bfloat16_weights(self) -> None:
        model = Small("armt", "llama").build().to(torch.bfloat16)
        (expected, _), (found, gradients) = run(model, text(3 * S), "sequential"), run(model, text(3 * S), "diagonal")
        assert found.dtype == torch.bfloat16
        assert relative_l2(found.log_softmax(-1), expected.log_softmax(-1)) < 0.1
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())

    def test_autocast_reaches_attention(self) -> None:
        model = Small("armt", "llama").build()
        with torch.autocast("cpu", torch.bfloat16):
            (expected, _), (found, gradients) = (
                run(model, text(3 * S), "sequential"),
                run(model, text(3 * S), "diagonal"),
            )
        assert relative_l2(found.log_softmax(-1), expected.log_softmax(-1)) < 0.1
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())

    def test_every_cell_draws_its_own_dropout(self) -> None:
        model = Small("armt", "gpt2").build().train()
        outputs: list[Tensor] = []
        for layer in model.modules():
            if isinstance(layer, ARMTLayer):
                # a layer that does nothing but drop out
                layer.layer.forward = lambda rows, *_, **__: nn.functional.dropout(torch.ones_like(rows))
                layer.register_forward_hook(lambda _, args, output: outputs.append(output))
        model(text(3 * S), schedule="diagonal")
        masks = torch.cat(outputs)
        assert len(masks) == 9
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 9


class TestAdapters:
    def test_gradients_reach_them(self, llama: ARMTForCausalLM) -> None:
        add_adapters(llama, target_modules=["q_proj", "down_proj"])
        assert_same(llama, text(3 * S, batch=2), 1e-9)
        assert sum(".lora_" in name for name, p in llama.named_parameters() if p.grad is not None) == 12

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"layers_to_transform": [0]}, "q_proj.base_layer"),
            ({"alpha_pattern": {"1.layer.self_attn.q_proj": 5}}, "scaling"),
        ],
    )
    def test_those_of_some_layers_are_refused(self, llama: ARMTForCausalLM, options: dict[str, Any], what: str) -> None:
        add_adapters(llama, target_modules=["q_proj"], **options)
        with pytest.raises(ValueError, match=f"{what}.* in layer 0 and .* in layer 1"):
            llama(text(3 * S), schedule="diagonal")


def add_adapters(model: RecurrentForCausalLM, **options: Any) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    LoraModel(model, LoraConfig(r=2, **options), "default")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)


class TestGrouping:
    @pytest.mark.parametrize(
        ("segments", "cells"), [(1, []), (2, [1, 2, 2, 1]), (3, [1, 2, 3, 2, 1]), (5, [1, 2, 3, 3, 3, 2, 1])]
    )
    def test_a_diagonal_is_one_call(
        self, armt: ARMTForCausalLM, monkeypatch: pytest.MonkeyPatch, segments: int, cells: list[int]
    ) -> None:
        found = []
        vmap = diagonal.vmap

        def counting(cell: Any, **options: Any) -> Any:
            grouped = vmap(cell, **options)

            def call(weights: dict[str, Tensor], cells: tuple[Tensor, ...]) -> Any:
                found.append(len(cells[0]))
                assert all(len(x) == len(cells[0]) for x in (*weights.values(), *cells))
                return grouped(weights, cells)

            return call

        monkeypatch.setattr(diagonal, "vmap", counting)
        armt(text(segments * S), schedule="diagonal")
        assert found == cells

    def test_layers_hand_out_what_they_computed(self, llama: ARMTForCausalLM) -> None:
        outputs: dict[str, list[Tensor]] = {"sequential": [], "diagonal": []}
        found: list[Tensor] = []
        llama.model.model.layers[1].register_forward_hook(lambda _, args, output: found.append(output.detach()))
        for schedule, of_schedule in outputs.items():
            llama(text(3 * S, batch=2), schedule=schedule)
            of_schedule += found
            found.clear()
        assert [tuple(x.shape[:2]) for x in outputs["diagonal"]] == [(3 * 2, S + M_TOKENS)]
        segments = outputs["diagonal"][0].split(2)
        # the last one does not close in the sequential order
        pairs = zip(segments, outputs["sequential"], strict=True)
        assert all(relative_l2(one[:, : other.shape[1]], other) < 1e-9 for one, other in pairs)

    def test_nothing_is_left_in_the_layers(self, armt: ARMTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = [layer for layer in armt.modules() if isinstance(layer, ARMTLayer)]
        armt(text(3 * S), schedule="diagonal")
        assert [layer.sweep for layer in layers] == [None] * 3
        monkeypatch.setattr(layers[0], "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            armt(text(3 * S), schedule="diagonal")
        assert [layer.sweep for layer in layers] == [None] * 3

    def test_torch_has_nothing_to_warn_of(self, armt: ARMTForCausalLM) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            armt(text(3 * S), labels=text(3 * S), schedule="diagonal").loss.backward()


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (Small("rmt", "llama"), "for model_type 'armt' alone; this is 'rmt'"),
            (Small("prmt", "llama"), "for model_type 'armt' alone; this is 'prmt'"),
            (Small("armt_sw", "llama"), "keys of the one before"),
            (Small("armt", "gpt2", {"variant": "v1", "wrap_pos": True, "sliding_window": True}), "keys of the one"),
            (Small("armt", "gemma3_text"), "gemma3_text has local layers"),
            (Small("armt", "gemma3_text", reach=WIDE), "is_sliding is True in layer 0 and False in layer 1"),
            (Small("armt", "gpt_neo", {"learned_positions": "restart"}), "gpt_neo has local layers"),
            (Small("armt", "llama", {"wrap_layers": [True, False, True]}), "`wrap_layers` leaves layers without"),
            (Small("armt", "llama", {"wrap_layers": [False] * 3}), "`wrap_layers` leaves layers without"),
            (
                Small("armt", "llama", {"segment_alignment": "right", "generation_policy": "open"}),
                "'right': only 'left' makes segments of equal length",
            ),
        ],
        ids=lambda x: x.name if isinstance(x, Small) else "",
    )
    def test_systems_that_cannot_be_grouped(self, kind: Small, message: str) -> None:
        model = kind.build()
        with pytest.raises(ValueError, match=f"{message}.*schedule='sequential'"):
            model(text(3 * S), schedule="diagonal")
        # as early as with a text of which there is nothing to group
        with pytest.raises(ValueError, match=message):
            model(text(2), schedule="diagonal")

    @pytest.mark.parametrize("options", [{"use_cache": True}, {"stay_open": True}])
    def test_parts_of_texts(self, armt: ARMTForCausalLM, options: dict[str, bool]) -> None:
        with pytest.raises(ValueError, match=r"whole texts.*without use_cache, past_key_values and stay_open"):
            armt(text(3 * S), schedule="diagonal", **options)
        cache = armt(text(S), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="whole texts"):
            armt(text(S), schedule="diagonal", past_key_values=cache)

    def test_checkpointing(self, armt: ARMTForCausalLM) -> None:
        armt.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing is on"):
            armt(text(3 * S), schedule="diagonal")

    def test_other_attention(self, armt: ARMTForCausalLM) -> None:
        armt.model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="'flash_attention_2': only 'sdpa' and 'eager'"):
            armt(text(3 * S), schedule="diagonal")

    def test_layers_that_compute_with_other_numbers(self) -> None:
        base = Small("armt", "gpt2").build().model
        base.config.scale_attn_by_inverse_layer_idx = True
        base = type(base)(base.config)
        model = ARMTForCausalLM.from_base(base, S, M_TOKENS, d_mem=4)
        with pytest.raises(ValueError, match=r"layer.attn.scaling is .* in layer 0 and .* in layer 1"):
            model(text(3 * S), schedule="diagonal")

    def test_unknown_orders(self, armt: ARMTForCausalLM) -> None:
        with pytest.raises(ValueError, match="`schedule` is 'parallel'; allowed: 'sequential', 'diagonal'"):
            armt(text(3 * S), schedule="parallel")

    def test_no_tokens(self, armt: ARMTForCausalLM) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            armt(torch.empty(1, 0, dtype=torch.long), schedule="diagonal")
