"""What cannot be converted is refused by a sentence that names it, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig

from tests.support.golden_cases import HF, ROOT, Golden
from tests.support.research_checkpoint import Case
from vllm_armt.checkpoints import WrapperArgs

UP_PROJ = "memory_cell.layers.0.layer.mlp.up_proj.weight"


class TestTensors:
    def test_a_missing_one_is_named(self, tied: Case) -> None:
        del tied.tensors[UP_PROJ]
        tied.refused("Missing tensor 'model.model.layers.0.layer.mlp.up_proj.weight'")

    def test_a_missing_memory_is_named(self, tied: Case) -> None:
        del tied.tensors["memory_cell.memory"]
        tied.refused("Missing tensor 'memory'")

    def test_one_too_many_is_named(self, tied: Case) -> None:
        tied.tensors["memory_cell.layers.0.layer.mlp.up_proj.bias"] = torch.ones(96)
        tied.refused("Unexpected tensor 'model.model.layers.0.layer.mlp.up_proj.bias'")

    def test_one_outside_of_the_wrapper_is_named(self, tied: Case) -> None:
        tied.tensors["optimizer.step"] = torch.ones(1)
        tied.refused("Unexpected tensor 'optimizer.step'")

    def test_an_ill_shaped_one_is_named(self, tied: Case) -> None:
        tied.tensors[UP_PROJ] = tied.tensors[UP_PROJ][:-1]
        tied.refused("'model.model.layers.0.layer.mlp.up_proj.weight' has shape [95, 64]")

    def test_unequal_duplicates_are_named(self, tied: Case) -> None:
        other = UP_PROJ.replace("memory_cell.layers", "memory_cell.model.model.layers")
        tied.tensors[other] = tied.tensors[UP_PROJ] + 1
        tied.refused("two names of one parameter")

    def test_a_tied_head_that_differs_from_the_embeddings(self, untied: Case, tied: Case) -> None:
        untied.base_config = tied.base_config
        untied.refused("ties 'model.lm_head.weight'")

    def test_layers_without_their_memory_are_not_taken_for_an_rmt(self, tied: Case) -> None:
        tied.tensors = {key: value for key, value in tied.tensors.items() if ".W_m" not in key}
        tied.given = {"system": "armt"}
        tied.refused("`system` was given as 'armt', but the checkpoint's tensors say 'rmt'")
        tied.given, tied.args = {}, {"segment_size": 16}
        tied.refused("Missing tensor 'model.model.layers.0.input_layernorm.weight'")


class TestFiles:
    def test_a_truncated_safetensors_file_is_named(self, tied: Case) -> None:
        src = tied.save()
        src.write_bytes(src.read_bytes()[:-1000])
        tied.refused(f"{src} cannot be read", src)

    def test_a_truncated_bin_file_is_named(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save(tied.tensors, src)
        src.write_bytes(src.read_bytes()[:-1000])
        tied.refused(f"{src} cannot be read", src)

    def test_a_pickle_of_something_else_is_not_run(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save({"path": Path("a")}, src)
        tied.refused(f"{src} cannot be read", src)

    def test_a_training_state_is_not_a_state_dict(self, tied: Case) -> None:
        src = tied.folder / "pytorch_model.bin"
        torch.save({"model": tied.tensors, "step": 3}, src)
        tied.refused("not a state dict", src)

    def test_a_missing_shard_is_named(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        shard = sorted(tmp_path.glob("*.safetensors"))[0]
        shard.unlink()
        tied.refused(f"{shard} does not exist", tmp_path)

    def test_an_index_that_lists_a_tensor_that_no_shard_has(self, tied: Case, tmp_path: Path) -> None:
        save_torch_state_dict(tied.tensors, tmp_path, max_shard_size=200_000)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
        index.write_text(json.dumps(content))
        tied.refused("'ghost'", tmp_path)

    def test_an_index_without_a_weight_map(self, tied: Case, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        tied.refused("is not an index of shards", tmp_path)

    def test_a_missing_file(self, tied: Case) -> None:
        tied.refused("absent.safetensors does not exist", tied.folder / "absent.safetensors")

    def test_a_directory_without_weights(self, tied: Case, tmp_path: Path) -> None:
        tied.refused("has none of model.safetensors", tmp_path)

    def test_a_tokenizer_directory_without_a_tokenizer(self, tied: Case, tmp_path: Path) -> None:
        tied.refused("no tokenizer files", tokenizer=tmp_path)

    def test_a_destination_that_is_in_use(self, tied: Case) -> None:
        tied.dst.mkdir()
        (tied.dst / "mine").write_text("kept")
        with pytest.raises(FileExistsError, match="not empty"):
            tied.convert()
        assert [path.name for path in tied.dst.iterdir()] == ["mine"]


class TestForeign:
    def test_a_plain_base_model_is_sent_to_init(self, tied: Case) -> None:
        tied.tensors = {"model.norm.weight": torch.ones(64)}
        tied.refused("vllm-armt init")

    @pytest.mark.parametrize("golden", HF, ids=lambda golden: golden.name)
    def test_the_authors_hf_layout_is_served_as_it_is(self, tied: Case, golden: Golden) -> None:
        tied.refused(f"vllm serve {golden.path}", golden.path)

    @pytest.mark.parametrize("name", ["armt_neox", "prmt_gpt2_wrap", "rmt_llama"])
    def test_so_is_what_was_converted(self, make_case: Callable[[str], Case], tied: Case, name: str) -> None:
        case = make_case(name)
        case.convert()
        tied.refused(f"vllm serve {case.dst}", case.dst)

    def test_an_unsupported_backbone(self, tied: Case, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
        tied.base_config = tmp_path
        tied.refused("'opt', which is not supported. Supported: ")

    def test_a_base_model_of_another_size(self, make_case: Callable[[str], Case], tied: Case) -> None:
        case = make_case("rmt_llama")
        case.base_config = ROOT / "armt_qwen2" / "base_config"
        case.refused(" of 3 layers, width 64, vocabulary 256, but ")

    @pytest.mark.parametrize("named", ["file", "directory"])
    def test_a_base_model_that_is_not_there_is_not_looked_for_by_transformers(
        self, tied: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
    ) -> None:
        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("transformers was asked"))
        missing = tmp_path / "config.json"
        tied.base_config = missing if named == "file" else tmp_path
        tied.refused(f"--base-config: {missing} does not exist. Give the base model's directory or config.json")

    def test_no_base_model(self, tied: Case) -> None:
        tied.base_config = None
        tied.refused("--base-config")


class TestArguments:
    def test_other_systems(self, tied: Case) -> None:
        tied.args["system"] = "armt_sw"
        tied.refused("system 'armt_sw' cannot be converted; only armt, armt_v2, armt_hf, prmt, rmt can")

    @pytest.mark.parametrize("name", ["act_on", "attend_to_previous_input"])
    def test_other_mathematics(self, tied: Case, name: str) -> None:
        tied.args[name] = True
        tied.refused(f"`{name}` is True, which is not supported")

    @pytest.mark.parametrize(
        ("name", "option", "owners"),
        [
            ("rmt_llama", "d_mem", "armt, armt_sw have"),
            ("prmt_gpt2_wrap", "variant", "armt, armt_sw have"),
            ("rmt_llama", "aliased", "prmt has"),
            ("armt_neox", "aliased", "prmt has"),
        ],
    )
    def test_an_argument_of_another_system(
        self, make_case: Callable[[str], Case], name: str, option: str, owners: str
    ) -> None:
        case = make_case(name)
        case.given = {option: 1}
        case.refused(f"System {case.golden.system!r} has no option `{option}`, only {owners}")

    def test_an_option_of_another_system(self, rmt: Case) -> None:
        rmt.refused("System 'rmt' has no option `use_sink`, only armt, armt_sw have", use_sink=True)

    def test_an_option_of_none(self, rmt: Case) -> None:
        rmt.refused("System 'rmt' has no option `colour`.", colour="red")

    def test_alignment_without_an_open_segment(self, prmt: Case) -> None:
        prmt.given = {"segment_alignment": "right"}
        prmt.refused("Only generation_policy 'open' goes with it", generation_policy="commit")

    def test_an_unknown_one(self, tied: Case) -> None:
        tied.args["learning_rate"] = 1e-3
        tied.refused("unknown arguments learning_rate")

    def test_a_missing_segment_size(self, tied: Case) -> None:
        del tied.args["segment_size"]
        tied.refused("`segment_size` is not in the checkpoint")

    def test_a_missing_variant(self, tied: Case) -> None:
        tied.args = {"segment_size": 16}
        tied.refused("--variant v1")

    def test_a_file_that_is_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "args.json").write_text("segment_size: 16")
        with pytest.raises(ValueError, match=r"args\.json is not JSON"):
            WrapperArgs.resolve(tmp_path / "args.json")
