"""Fresh models and saved ones: what is drawn, which names and dtypes are on disk, what opens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.golden_cases import HF, ROOT, Golden, relative_l2
from tests.support.small_hf import M_TOKENS, S, Small, text, tiny_base
from vllm_armt.hf import ARMTForCausalLM, RecurrentForCausalLM

hf_goldens = pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


class TestFresh:
    @pytest.mark.parametrize("backbone", ["llama", "gpt2", "gpt_neox"])
    def test_an_armt_is_the_base_model_inside_one_segment(self, backbone: str) -> None:
        expected = logits(tiny_base(backbone), text(S))
        assert relative_l2(logits(Small("armt", backbone).build(), text(S)), expected) < 1e-5

    def test_until_w_mv_is_trained_every_segment_is_the_base_model(self, base: PreTrainedModel) -> None:
        ids = text(2 * S)
        expected = torch.cat([logits(base, part) for part in ids.split(S, dim=1)], dim=1)
        model = ARMTForCausalLM.from_base(base, segment_size=S, num_mem_tokens=3, d_mem=4)
        assert relative_l2(logits(model, ids), expected) < 1e-5

    @pytest.mark.parametrize(("system", "before"), [("armt", 0), ("rmt", M_TOKENS), ("prmt", M_TOKENS)])
    def test_wrap_pos_keeps_the_base_models_positions_between_those_of_memory(self, system: str, before: int) -> None:
        old = tiny_base("gpt2").transformer.wpe.weight
        wide = Small(system, "gpt2", {"wrap_pos": True}).build().model.transformer.wpe.weight
        assert len(wide) == len(old) + before + M_TOKENS
        assert torch.equal(wide[before : before + len(old)], old)
        new = torch.cat([wide[:before], wide[before + len(old) :]])
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.3)

    def test_memory_has_the_scale_of_the_embeddings(self, model: RecurrentForCausalLM) -> None:
        scale = model.get_input_embeddings().weight.std().item()
        memories = [p for name, p in model.named_parameters() if name.endswith("memory")]
        assert memories
        assert all(memory.std().item() == pytest.approx(scale, rel=0.3) for memory in memories)

    def test_a_model_from_a_config_is_initialised_alike(self, model: RecurrentForCausalLM) -> None:
        fresh = AutoModelForCausalLM.from_config(model.config)
        assert type(fresh) is type(model)
        scale = fresh.get_input_embeddings().weight.std().item()
        drawn = {name: p.std().item() for name, p in fresh.named_parameters() if name.endswith("memory")}
        assert drawn
        assert all(std == pytest.approx(scale, rel=0.3) for std in drawn.values())

    def test_weights_that_a_file_lacks_are_never_drawn(self, model: RecurrentForCausalLM, tmp_path: Path) -> None:
        lacking = next(name for name, _ in model.named_parameters() if name.endswith("memory"))
        state = {name: tensor for name, tensor in model.state_dict().items() if name != lacking}
        model.save_pretrained(tmp_path, state_dict=state)
        with pytest.raises(ValueError, match=f"lacks tensors that its config.json asks for: {lacking}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_an_armt_from_a_config_writes_nothing_yet(self, armt: ARMTForCausalLM) -> None:
        layer = AutoModelForCausalLM.from_config(armt.config).model.model.layers[0]
        assert not layer.W_mv.weight.any()
        assert not layer.W_mb.bias.any()
        assert layer.W_mq.weight.std() > 0.01


class TestAuthorsFiles:
    @hf_goldens
    def test_they_load_without_a_key_too_many_or_too_few(self, golden: Golden) -> None:
        model, info = AutoModelForCausalLM.from_pretrained(golden.path, output_loading_info=True)
        assert model.config.architectures == [type(model).__name__]
        assert not any(info.values())

    @hf_goldens
    def test_saving_writes_the_same_tensors_under_the_same_names(self, golden: Golden, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_pretrained(golden.path).save_pretrained(tmp_path)
        saved, original = load_file(tmp_path / "model.safetensors"), load_file(golden.path / "model.safetensors")
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in original)
        architectures = json.loads((golden.path / "config.json").read_text())["architectures"]
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == architectures

    @hf_goldens
    def test_the_head_is_tied_exactly_when_the_base_model_says_so(self, golden: Golden) -> None:
        model = AutoModelForCausalLM.from_pretrained(golden.path)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (f"model.{model.config.backbone.head}.weight" not in load_file(golden.checkpoint))


class TestSaved:
    def test_a_saved_model_loads_to_the_same_logits(self, model: RecurrentForCausalLM, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), model.config_class)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        state, loaded_state = model.state_dict(), loaded.state_dict()
        assert loaded_state.keys() == state.keys()
        assert all(torch.equal(loaded_state[name], state[name]) for name in state)
        assert relative_l2(logits(loaded, text(20)), logits(model, text(20))) < 1e-5

    @pytest.mark.parametrize(
        ("kind", "added"),
        [
            (Small("rmt", "llama"), {"memory": (M_TOKENS, 64)}),
            (Small("prmt", "llama"), {f"model.model.layers.{i}.memory": (1, M_TOKENS, 64) for i in range(3)}),
            (
                Small("armt", "llama", {"gating": True, "wrap_layers": [False, False, True]}),
                {"memory": (M_TOKENS, 64)}
                | {f"model.model.layers.2.{name}.weight": (4, 64) for name in ("W_mq", "W_mk")}
                | {f"model.model.layers.2.{name}.weight": (64, 64) for name in ("W_mv", "W_mb")}
                | {"model.model.layers.2.W_mb.bias": (64,)},
            ),
        ],
        ids=["rmt", "prmt", "armt"],
    )
    def test_a_system_adds_its_own_tensors_and_no_others(
        self, kind: Small, added: dict[str, tuple[int, ...]], tmp_path: Path
    ) -> None:
        kind.build().save_pretrained(tmp_path)
        base = {f"model.{name}" for name in tiny_base("llama").state_dict()} - {"model.lm_head.weight"}
        saved = {
            name.replace(".layer.", "."): tuple(t.shape)
            for name, t in load_file(tmp_path / "model.safetensors").items()
        }
        assert saved.keys() - base == added.keys()
        assert base <= saved.keys()
        assert {name: saved[name] for name in added} == added

    @pytest.mark.parametrize("system", ["armt", "armt_sw", "prmt", "rmt"])
    def test_only_wrapped_layers_have_the_infix(self, system: str) -> None:
        names = Small(system, "llama").build().state_dict()
        assert any(".layer." in name for name in names) == (system != "rmt")

    @pytest.mark.parametrize("system", ["armt", "prmt", "rmt"])
    def test_a_memory_of_its_own_dtype_keeps_it(self, system: str, tmp_path: Path) -> None:
        kind = Small(system, "llama", {"memory_dtype": "float32"})
        model = kind.build(torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
        own = {name for name in dtypes if name.endswith("memory") or ".W_m" in name}
        assert {dtypes[name] for name in own} == {torch.float32}
        assert {dtypes[name] for name in dtypes.keys() - own} == {torch.bfloat16}
        output = loaded(text(20), use_cache=True)
        assert output.logits.dtype == torch.bfloat16
        loaded.close_segment(output.past_key_values)
        assert all(M.dtype == torch.float32 for M in output.past_key_values.M.values())

    def test_config_states_the_dtype_of_the_saved_weights(self, armt: ARMTForCausalLM, tmp_path: Path) -> None:
        armt.save_pretrained(tmp_path / "float32")
        ARMTForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
        assert json.loads((tmp_path / "half" / "config.json").read_text())["model_dtype"] == "bfloat16"
        assert ARMTForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


class TestOtherTensors:
    """Transformers draws at random what is missing, and only reports it."""

    def change(self, armt: ARMTForCausalLM, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
        armt.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @pytest.mark.parametrize("opened_by", [AutoModelForCausalLM, ARMTForCausalLM])
    def test_a_missing_one_is_an_error(self, armt: ARMTForCausalLM, tmp_path: Path, opened_by: Any) -> None:
        self.change(armt, tmp_path, lambda tensors: tensors.pop("model.model.layers.1.W_mv.weight"))
        with pytest.raises(
            ValueError, match=r"lacks tensors .*: model\.model\.layers\.1\.W_mv\.weight\. .*convert SRC"
        ):
            opened_by.from_pretrained(tmp_path)

    def test_one_without_a_place_is_an_error(self, armt: ARMTForCausalLM, tmp_path: Path) -> None:
        self.change(armt, tmp_path, lambda tensors: tensors.update({"model.model.layers.0.mem_layer.x": torch.ones(1)}))
        with pytest.raises(
            ValueError, match=r"has tensors that a model of its config.json does not: model\.model\.lay"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_constants_that_transformers_once_saved_are_none(self, armt: ARMTForCausalLM, tmp_path: Path) -> None:
        old = {"model.model.layers.0.layer.self_attn.rotary_emb.inv_freq": torch.ones(1)}
        self.change(armt, tmp_path, lambda tensors: tensors.update(old))
        assert AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()

    def test_a_checkpoint_of_the_outer_loop_is_sent_to_convert(self) -> None:
        with pytest.raises(ValueError, match=r"whose tensors have other names .*vllm-armt convert SRC DST"):
            AutoModelForCausalLM.from_pretrained(ROOT / "outer_llama")
