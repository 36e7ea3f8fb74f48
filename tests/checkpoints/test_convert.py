"""Every spelling of the authors' research checkpoints becomes the same directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from tests.checkpoints.conftest import Case
from vllm_armt.hf import ARMTForCausalLM

LAYERS, INNER = "memory_cell.layers.", "memory_cell.model.model.layers."
HEAD, EMBEDDINGS = "memory_cell.model.lm_head.weight", "memory_cell.model.model.embed_tokens.weight"


def rename(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in tensors.items()}


def with_duplicates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `torch.save` of the state dict holds: every name of every parameter."""
    everything = tensors | rename(tensors, LAYERS, INNER)
    return {EMBEDDINGS: everything[HEAD]} | everything


def expected(case: Case) -> dict[str, Tensor]:
    """The tensors by our names, taken from the `save_model` spelling of a checkpoint with a tied head."""
    names = rename(rename(case.tensors, LAYERS, "model.model.layers."), "memory_cell.model.", "model.")
    names["memory"] = names.pop("memory_cell.memory")
    names["model.model.embed_tokens.weight"] = names.pop("model.lm_head.weight")
    return names


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestSpellings:
    def test_save_model_with_a_tied_head(self, tied: Case) -> None:
        tied.convert()
        assert equal(tied.result(), expected(tied))

    def test_save_model_with_an_untied_head(self, untied: Case) -> None:
        untied.convert()
        assert torch.equal(untied.result()["model.lm_head.weight"], untied.tensors[HEAD])
        assert torch.equal(untied.result()["model.model.embed_tokens.weight"], untied.tensors[EMBEDDINGS])

    def test_torch_save_with_all_duplicates(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save(with_duplicates(tied.tensors), src)
        tied.convert(src)
        assert equal(tied.result(), expected(tied))

    def test_accelerate_save_model(self, tied: Case) -> None:
        names = expected(tied)
        tied.tensors = rename(rename(tied.tensors, LAYERS, INNER), HEAD, EMBEDDINGS)
        tied.convert()
        assert equal(tied.result(), names)

    def test_a_student_beside_its_teacher(self, tied: Case) -> None:
        names = expected(tied)
        tied.tensors = {"student." + key: value for key, value in tied.tensors.items()}
        tied.tensors["teacher.model.norm.weight"] = torch.ones(64)
        tied.convert()
        assert equal(tied.result(), names)

    def test_the_outer_loop_class(self, tied: Case) -> None:
        names = expected(tied)
        tied.tensors = {"armt." + key: value for key, value in tied.tensors.items()}
        tied.convert()
        assert equal(tied.result(), names)

    def test_buffers_of_old_transformers_are_left_out(self, tied: Case) -> None:
        names = expected(tied)
        tied.tensors[LAYERS + "0.layer.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tied.tensors[LAYERS + "0.layer.attn.bias"] = torch.ones(1)
        tied.tensors[LAYERS + "0.layer.attn.masked_bias"] = torch.ones(1)
        tied.convert()
        assert equal(tied.result(), names)

    def test_a_directory(self, tied: Case) -> None:
        tied.save()
        tied.convert(tied.folder)
        assert equal(tied.result(), expected(tied))

    def test_shards_with_an_index(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        tied.convert(tmp_path)
        assert equal(tied.result(), expected(tied))


class TestLora:
    def test_adapters_are_merged_with_their_scale(self, lora: Case) -> None:
        lora.convert()
        layer = LAYERS + "1.layer.self_attn.v_proj."
        A, B = (lora.tensors[f"{layer}lora_{part}.default.weight"] for part in "AB")
        W = lora.tensors[layer + "base_layer.weight"] + 32 / 8 * (B @ A)
        assert torch.allclose(lora.result()["model.model.layers.1.layer.self_attn.v_proj.weight"], W, atol=1e-6)
        assert not any("lora" in name or "base_layer" in name for name in lora.result())

    def test_the_bias_of_an_adapted_layer_is_kept(self, lora: Case, tmp_path: Path) -> None:
        config = json.loads((lora.base_config / "config.json").read_text()) | {"attention_bias": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        lora.base_config = tmp_path
        for key in [key for key in lora.tensors if key.endswith("_proj.weight") or key.endswith("base_layer.weight")]:
            if "self_attn" in key:
                lora.tensors[key.removesuffix("weight") + "bias"] = torch.randn(len(lora.tensors[key]))
        lora.convert()
        source = lora.tensors[LAYERS + "0.layer.self_attn.q_proj.base_layer.bias"]
        assert torch.equal(lora.result()["model.model.layers.0.layer.self_attn.q_proj.bias"], source)


class TestDirectory:
    def test_config_says_what_the_checkpoint_does_not(self, tied: Case) -> None:
        tied.args |= {"correction": False}
        conversion = tied.convert()
        config = json.loads((tied.dst / "config.json").read_text())
        said = {name: config[name] for name in ("segment_size", "num_mem_tokens", "d_mem", "variant", "correction")}
        assert said == {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8, "variant": "v1", "correction": False}
        assert config["generation_policy"] == "open"
        assert conversion.assumed == {"use_denom": True}

    def test_generation_policy_can_be_chosen(self, tied: Case) -> None:
        tied.convert(generation_policy="commit")
        assert json.loads((tied.dst / "config.json").read_text())["generation_policy"] == "commit"

    def test_an_explicit_value_wins_over_the_file(self, tied: Case) -> None:
        tied.given = {"segment_size": 32, "variant": "v2", "use_denom": False}
        conversion = tied.convert()
        config = conversion.config
        assert (config.segment_size, config.variant, config.use_denom) == (32, "v2", False)
        assert conversion.assumed == {}

    def test_no_path_of_this_machine_is_written(self, tied: Case) -> None:
        tied.convert()
        assert str(tied.base_config) not in (tied.dst / "config.json").read_text()

    def test_weights_are_marked_as_torch_tensors(self, tied: Case) -> None:
        tied.convert()
        with safe_open(tied.dst / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_a_memory_in_another_dtype_keeps_it(self, tied: Case) -> None:
        memory = ("memory_cell.memory", "W_m")
        tied.tensors = {
            key: value if any(part in key for part in memory) else value.to(torch.bfloat16)
            for key, value in tied.tensors.items()
        }
        config = tied.convert().config
        assert (config.model_dtype, config.memory_dtype) == ("bfloat16", "float32")
        loaded = ARMTForCausalLM.from_pretrained(tied.dst)
        assert (loaded.model.dtype, loaded.memory.dtype) == (torch.bfloat16, torch.float32)

    def test_mixed_dtypes_are_widened(self, tied: Case) -> None:
        key = LAYERS + "0.layer.mlp.up_proj.weight"
        tied.tensors[key] = tied.tensors[key].to(torch.bfloat16)
        tied.convert()
        widened = tied.result()["model.model.layers.0.layer.mlp.up_proj.weight"]
        assert torch.equal(widened, tied.tensors[key].float())

    def test_the_tokenizer_beside_the_checkpoint_is_copied(self, tied: Case) -> None:
        (tied.folder / "tokenizer.json").write_text("{}")
        (tied.folder / "chat_template.jinja").write_text("template")
        assert tied.convert().tokenizer == tied.folder
        assert (tied.dst / "tokenizer.json").read_text() == "{}"
        assert (tied.dst / "chat_template.jinja").read_text() == "template"

    def test_a_named_tokenizer_is_preferred(self, tied: Case, tmp_path: Path) -> None:
        (tied.folder / "tokenizer.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text('{"named": 1}')
        assert tied.convert(tokenizer=tmp_path).tokenizer == tmp_path
        assert (tied.dst / "tokenizer.json").read_text() == '{"named": 1}'

    def test_the_base_models_generation_config_is_taken_over(self, tied: Case, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text((tied.base_config / "config.json").read_text())
        GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
        tied.base_config = tmp_path
        tied.convert()
        assert GenerationConfig.from_pretrained(tied.dst).eos_token_id == [7, 8]

    def test_it_may_be_an_empty_directory(self, tied: Case) -> None:
        tied.dst.mkdir()
        tied.convert()
        assert tied.result()
