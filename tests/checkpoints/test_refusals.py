"""What cannot be converted is refused by a sentence that names it, and nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import ROOT
from huggingface_hub import save_torch_state_dict

from tests.checkpoints.conftest import Case
from vllm_armt.checkpoints import WrapperArgs

UP_PROJ = "memory_cell.layers.0.layer.mlp.up_proj.weight"


def refused(case: Case, message: str, src: Path | None = None, **options: Any) -> None:
    """The conversion fails with this message and leaves the folder as it was."""
    src = src or case.save()
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        case.convert(src, **options)
    assert not case.dst.exists()
    assert not [path for path in case.folder.iterdir() if path.name.startswith(".")]


class TestTensors:
    def test_a_missing_one_is_named(self, tied: Case) -> None:
        del tied.tensors[UP_PROJ]
        refused(tied, "Missing tensor 'model.model.layers.0.layer.mlp.up_proj.weight'")

    def test_a_missing_memory_is_named(self, tied: Case) -> None:
        del tied.tensors["memory_cell.memory"]
        refused(tied, "Missing tensor 'memory'")

    def test_one_too_many_is_named(self, tied: Case) -> None:
        tied.tensors["memory_cell.layers.0.layer.mlp.up_proj.bias"] = torch.ones(96)
        refused(tied, "Unexpected tensor 'model.model.layers.0.layer.mlp.up_proj.bias'")

    def test_one_outside_of_the_wrapper_is_named(self, tied: Case) -> None:
        tied.tensors["optimizer.step"] = torch.ones(1)
        refused(tied, "Unexpected tensor 'optimizer.step'")

    def test_an_ill_shaped_one_is_named(self, tied: Case) -> None:
        tied.tensors[UP_PROJ] = tied.tensors[UP_PROJ][:-1]
        refused(tied, "'model.model.layers.0.layer.mlp.up_proj.weight' has shape [95, 64]")

    def test_unequal_duplicates_are_named(self, tied: Case) -> None:
        other = UP_PROJ.replace("memory_cell.layers", "memory_cell.model.model.layers")
        tied.tensors[other] = tied.tensors[UP_PROJ] + 1
        refused(tied, "two names of one parameter")

    def test_a_tied_head_that_differs_from_the_embeddings(self, untied: Case, tied: Case) -> None:
        untied.base_config = tied.base_config
        refused(untied, "ties 'model.lm_head.weight'")

    def test_several_heads(self, tied: Case) -> None:
        tied.tensors["memory_cell.layers.0.W_mb.weight"] = torch.ones(2, 64)
        refused(tied, "n_heads=1")


class TestLora:
    def test_an_unknown_scale(self, lora: Case) -> None:
        lora.args["lora"] = None
        refused(lora, "--lora-alpha")

    def test_half_an_adapter(self, lora: Case) -> None:
        name = "memory_cell.layers.0.layer.self_attn.q_proj.lora_B.default.weight"
        del lora.tensors[name]
        refused(lora, "Missing tensor 'model.model.layers.0.layer.self_attn.q_proj.lora_B.default.weight'")

    def test_an_adapter_that_does_not_fit(self, lora: Case) -> None:
        name = "memory_cell.layers.0.layer.self_attn.q_proj.lora_A.default.weight"
        lora.tensors[name] = lora.tensors[name][:4]
        refused(lora, "does not fit")

    def test_other_parts_of_an_adapter(self, lora: Case) -> None:
        lora.tensors["memory_cell.layers.0.layer.self_attn.q_proj.lora_magnitude_vector.default.weight"] = torch.ones(
            64
        )
        refused(lora, "Unexpected tensor 'model.model.layers.0.layer.self_attn.q_proj.lora_magnitude_vector")


class TestFiles:
    def test_a_truncated_safetensors_file_is_named(self, tied: Case) -> None:
        src = tied.save()
        src.write_bytes(src.read_bytes()[:-1000])
        refused(tied, f"{src} cannot be read", src)

    def test_a_truncated_bin_file_is_named(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save(tied.tensors, src)
        src.write_bytes(src.read_bytes()[:-1000])
        refused(tied, f"{src} cannot be read", src)

    def test_a_pickle_of_something_else_is_not_run(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save({"path": Path("a")}, src)
        refused(tied, f"{src} cannot be read", src)

    def test_a_training_state_is_not_a_state_dict(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save({"model": tied.tensors, "step": 3}, src)
        refused(tied, "not a state dict", src)

    def test_a_missing_shard_is_named(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        shard = sorted(tmp_path.glob("*.safetensors"))[0]
        shard.unlink()
        refused(tied, f"{shard} does not exist", tmp_path)

    def test_an_index_that_lists_a_tensor_that_no_shard_has(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
        index.write_text(json.dumps(content))
        refused(tied, "'ghost'", tmp_path)

    def test_an_index_without_a_weight_map(self, tied: Case, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        refused(tied, "is not an index of shards", tmp_path)

    def test_a_missing_file(self, tied: Case) -> None:
        refused(tied, "absent.safetensors does not exist", tied.folder / "absent.safetensors")

    def test_a_directory_without_weights(self, tied: Case, tmp_path: Path) -> None:
        refused(tied, "has none of model.safetensors", tmp_path)

    def test_a_tokenizer_directory_without_a_tokenizer(self, tied: Case, tmp_path: Path) -> None:
        refused(tied, "no tokenizer files", tokenizer=tmp_path)

    def test_a_destination_that_is_in_use(self, tied: Case) -> None:
        tied.dst.mkdir()
        (tied.dst / "mine").write_text("kept")
        with pytest.raises(FileExistsError, match="not empty"):
            tied.convert()
        assert [path.name for path in tied.dst.iterdir()] == ["mine"]


class TestForeign:
    def test_a_plain_base_model_is_sent_to_init(self, tied: Case) -> None:
        tied.tensors = {"model.norm.weight": torch.ones(64)}
        refused(tied, "vllm-armt init")

    def test_an_rmt(self, tied: Case) -> None:
        tied.tensors = {key: value for key, value in tied.tensors.items() if ".W_m" not in key}
        refused(tied, "RMT")

    def test_the_authors_hf_layout_is_served_as_it_is(self, tied: Case) -> None:
        hf = ROOT / "armt_hf_llama"
        refused(tied, f"vllm serve {hf}", hf)

    def test_an_unsupported_backbone(self, tied: Case, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        tied.base_config = tmp_path
        refused(tied, "'gpt2', which is not supported")


class TestArguments:
    @pytest.mark.parametrize("system", ["rmt", "prmt", "armt_sw"])
    def test_other_systems(self, tied: Case, system: str) -> None:
        tied.args["system"] = system
        refused(tied, f"system '{system}' cannot be converted")

    @pytest.mark.parametrize(
        ("name", "value"), [("n_heads", 2), ("gating", True), ("wrap_pos", True), ("segment_alignment", "right")]
    )
    def test_other_mathematics(self, tied: Case, name: str, value: Any) -> None:
        tied.args[name] = value
        refused(tied, f"`{name}` is {value!r}")

    @pytest.mark.parametrize(("name", "given", "found"), [("num_mem_tokens", 5, 4), ("d_mem", 16, 8)])
    def test_sizes_that_contradict_the_tensors(self, tied: Case, name: str, given: int, found: int) -> None:
        tied.args[name] = given
        refused(tied, f"`{name}` was given as {given}, but the checkpoint's tensors say {found}")

    def test_an_unknown_one(self, tied: Case) -> None:
        tied.args["learning_rate"] = 1e-3
        refused(tied, "unknown arguments learning_rate")

    def test_a_missing_segment_size(self, tied: Case) -> None:
        del tied.args["segment_size"]
        refused(tied, "`segment_size` is not in the checkpoint")

    def test_a_missing_variant(self) -> None:
        with pytest.raises(ValueError, match="--variant v1"):
            WrapperArgs.resolve(segment_size=16)

    def test_a_file_that_is_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "args.json").write_text("segment_size: 16")
        with pytest.raises(ValueError, match=r"args\.json is not JSON"):
            WrapperArgs.resolve(tmp_path / "args.json")
