"""What the transformers model promises beside the authors' numbers: state, gradients, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import HF, Golden, relative_l2
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_armt.hf import ARMTForCausalLM

S = 8


def text(length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    return model(ids, **kwargs).logits


def close(a: Tensor, b: Tensor) -> bool:
    return relative_l2(a, b) < 1e-5


class TestState:
    def test_memory_carries_the_first_token_to_the_last_segment(self, armt: ARMTForCausalLM) -> None:
        ids = text(3 * S)
        changed = ids.clone()
        changed[0, 0] = (ids[0, 0] + 1) % 256
        assert relative_l2(logits(armt, changed)[:, -S:], logits(armt, ids)[:, -S:]) > 1e-3

    @torch.no_grad()
    @pytest.mark.parametrize("cuts", [[5], [S], [S - 1, S + 1], [1, 2, 17], [20], list(range(1, 29))])
    def test_any_cut_into_calls_gives_the_same_logits_and_memory(self, armt: ARMTForCausalLM, cuts: list[int]) -> None:
        ids = text(29)
        whole = armt(ids, use_cache=True)
        cache: Any = None
        parts = []
        for chunk in ids.tensor_split(cuts, dim=1):
            output = armt(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert close(torch.cat(parts, dim=1), whole.logits)
        assert all(close(cache.M[i], M) for i, M in whole.past_key_values.M.items())

    def test_no_state_is_returned_unless_asked_for(self, armt: ARMTForCausalLM) -> None:
        assert armt(text(20)).past_key_values is None

    def test_a_copied_state_can_be_continued_twice(self, armt: ARMTForCausalLM) -> None:
        with torch.no_grad():
            cache = armt(text(20), use_cache=True).past_key_values
        first = logits(armt, text(9), past_key_values=copy.deepcopy(cache))
        assert torch.equal(logits(armt, text(9), past_key_values=cache), first)

    def test_a_closed_partial_segment_is_followed_by_a_new_one(self, armt: ARMTForCausalLM) -> None:
        cache = armt(text(S + 3), use_cache=True).past_key_values
        armt.close_segment(cache)
        assert (cache.segments, cache.tokens, cache.open_tokens, cache.kv) == (2, S + 3, 0, None)
        armt(text(S + 1), past_key_values=cache)
        assert (cache.segments, cache.tokens, cache.open_tokens) == (3, 2 * S + 4, 1)

    def test_closing_without_an_open_segment_is_refused(self, armt: ARMTForCausalLM) -> None:
        cache = armt(text(3), use_cache=True).past_key_values
        armt.close_segment(cache)
        with pytest.raises(ValueError, match="No segment is open"):
            armt.close_segment(cache)

    def test_empty_input_is_refused(self, armt: ARMTForCausalLM) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            armt(torch.empty(1, 0, dtype=torch.long))

    def test_memory_is_float32_in_a_bfloat16_model(self, armt: ARMTForCausalLM) -> None:
        cache = armt.to(torch.bfloat16)(text(20), use_cache=True).past_key_values
        assert cache.M[0].dtype == cache.z[0].dtype == torch.float32


class TestBatch:
    def test_rows_are_independent(self, armt: ARMTForCausalLM) -> None:
        ids = text(21, batch=3)
        assert close(logits(armt, ids)[1], logits(armt, ids[1:2])[0])

    def test_right_padding_leaves_the_logits_of_real_tokens(self, armt: ARMTForCausalLM) -> None:
        ids = text(21, batch=2)
        mask = torch.ones_like(ids)
        mask[0, 13:] = 0
        assert close(logits(armt, ids * mask, attention_mask=mask)[0, :13], logits(armt, ids[:1, :13])[0])

    def test_left_padding_is_refused(self, armt: ARMTForCausalLM) -> None:
        mask = torch.ones(1, 10, dtype=torch.long)
        mask[0, 0] = 0
        with pytest.raises(ValueError, match="pad on the right"):
            armt(text(10), attention_mask=mask)


class TestOutput:
    def test_loss_is_that_of_the_next_token(self, armt: ARMTForCausalLM) -> None:
        ids = text(20)
        output = armt(ids, labels=ids)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
        assert torch.allclose(output.loss, expected)

    def test_only_the_last_logits_when_asked(self, armt: ARMTForCausalLM) -> None:
        ids = text(20)
        assert close(logits(armt, ids, logits_to_keep=2), logits(armt, ids)[:, -2:])

    def test_embeddings_in_place_of_tokens(self, armt: ARMTForCausalLM) -> None:
        ids = text(20)
        embeds = armt.get_input_embeddings()(ids)
        assert torch.equal(armt(inputs_embeds=embeds).logits, armt(ids).logits)


class TestGradients:
    def test_they_flow_through_several_segments(self, armt: ARMTForCausalLM) -> None:
        embeds = armt.get_input_embeddings()(text(3 * S)).detach().requires_grad_()
        layer = armt.model.model.layers[0]
        weights = [linear.weight for linear in (layer.W_mq, layer.W_mk, layer.W_mv, layer.W_mb)]
        last = armt(inputs_embeds=embeds).logits[:, -1].square().sum()
        to_embeds, *to_weights = torch.autograd.grad(last, [embeds, armt.memory, *weights])
        assert to_embeds[:, :S].norm() > 0
        assert all(gradient.norm() > 0 for gradient in to_weights)

    def test_checkpointing_changes_nothing(self, armt: ARMTForCausalLM) -> None:
        ids = text(3 * S)

        def gradient() -> Tensor:
            armt.zero_grad()
            armt(ids, labels=ids).loss.backward()
            return armt.model.model.layers[0].W_mk.weight.grad.clone()

        armt.train()
        plain = gradient()
        armt.gradient_checkpointing_enable()
        assert armt.is_gradient_checkpointing
        assert close(gradient(), plain)

    def test_checkpointing_with_a_state_to_keep_is_refused(self, armt: ARMTForCausalLM) -> None:
        armt.train()
        armt.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="use_cache=False"):
            armt(text(9), use_cache=True)


class TestFresh:
    def test_it_is_the_base_model_inside_one_segment(self, base: PreTrainedModel) -> None:
        expected = logits(base, text(S))
        model = ARMTForCausalLM.from_base(base, segment_size=S, num_mem_tokens=3, d_mem=4)
        assert close(logits(model, text(S)), expected)

    def test_until_w_mv_is_trained_every_segment_is_the_base_model(self, base: PreTrainedModel) -> None:
        ids = text(2 * S)
        expected = torch.cat([logits(base, part) for part in ids.split(S, dim=1)], dim=1)
        model = ARMTForCausalLM.from_base(base, segment_size=S, num_mem_tokens=3, d_mem=4)
        assert close(logits(model, ids), expected)

    def test_memory_tokens_have_the_scale_of_the_embeddings(self, armt: ARMTForCausalLM) -> None:
        scale = armt.get_input_embeddings().weight.std().item()
        assert armt.memory.std().item() == pytest.approx(scale, rel=0.3)

    def test_a_model_from_a_config_is_initialised_alike(self, armt: ARMTForCausalLM) -> None:
        model = AutoModelForCausalLM.from_config(armt.config)
        layer = model.model.model.layers[0]
        assert not layer.W_mv.weight.any()
        assert not layer.W_mb.bias.any()
        assert layer.W_mq.weight.std() > 0.01
        assert model.memory.std().item() == pytest.approx(model.get_input_embeddings().weight.std().item(), rel=0.3)


class TestFiles:
    @pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
    def test_the_authors_files_load_without_a_key_too_many_or_too_few(self, golden: Golden) -> None:
        model, info = AutoModelForCausalLM.from_pretrained(golden.path, output_loading_info=True)
        assert isinstance(model, ARMTForCausalLM)
        assert not any(info.values())

    @pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
    def test_saving_writes_the_same_tensors_under_the_same_names(self, golden: Golden, tmp_path: Path) -> None:
        ARMTForCausalLM.from_pretrained(golden.path).save_pretrained(tmp_path)
        saved, original = load_file(tmp_path / "model.safetensors"), load_file(golden.path / "model.safetensors")
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in original)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ARMTForCausalLM"]

    @pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
    def test_the_head_is_tied_exactly_when_the_base_model_says_so(self, golden: Golden) -> None:
        model = ARMTForCausalLM.from_pretrained(golden.path)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == ("model.lm_head.weight" not in load_file(golden.path / "model.safetensors"))

    def test_a_saved_model_loads_to_the_same_logits(self, armt: ARMTForCausalLM, tmp_path: Path) -> None:
        armt.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, text(20)), logits(armt, text(20)))

    def test_a_memory_of_its_own_dtype_keeps_it(self, base: PreTrainedModel, tmp_path: Path) -> None:
        base.to(torch.bfloat16)
        model = ARMTForCausalLM.from_base(base, S, num_mem_tokens=3, d_mem=4, memory_dtype="float32")
        model.save_pretrained(tmp_path)
        loaded = ARMTForCausalLM.from_pretrained(tmp_path)
        layer = loaded.model.model.layers[0]
        assert layer.layer.mlp.up_proj.weight.dtype == torch.bfloat16
        assert loaded.memory.dtype == layer.W_mk.weight.dtype == torch.float32
        output = loaded(text(20), use_cache=True)
        assert output.logits.dtype == torch.bfloat16
        loaded.close_segment(output.past_key_values)
        assert output.past_key_values.M[0].dtype == torch.float32

    def test_config_states_the_dtype_of_the_saved_weights(self, armt: ARMTForCausalLM, tmp_path: Path) -> None:
        armt.save_pretrained(tmp_path / "float32")
        ARMTForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
        assert json.loads((tmp_path / "half" / "config.json").read_text())["model_dtype"] == "bfloat16"
        assert ARMTForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
