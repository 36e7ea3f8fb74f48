"""Damaged and malicious files: one sentence that names the file and what is wrong with it, within seconds."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.strangers import Stranger
from vllm_armt.checkpoints.files import MOST_JSON, read_json
from vllm_armt.checkpoints.read import read_tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Stranger.make(tmp_path_factory.mktemp("whole")).folder


@pytest.fixture
def stranger(whole: Path, tmp_path: Path) -> Stranger:
    shutil.copytree(whole, tmp_path / "copy")
    return Stranger(tmp_path / "copy")


def change(file: Path, **fields: Any) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file


def test_the_whole_ones_are_taken(stranger: Stranger) -> None:
    stranger.convert()
    shutil.rmtree(stranger.dst)
    stranger.init()
    shutil.rmtree(stranger.dst)
    stranger.convert_older()
    stranger.open_config()


class TestShards:
    @pytest.fixture
    def index(self, stranger: Stranger) -> Path:
        """An index of one shard in `research`."""
        research = stranger.folder / "research"
        (research / "model.safetensors").rename(research / "a.safetensors")
        index = research / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"weight_map": dict.fromkeys(load_file(research / "a.safetensors"), "a.safetensors")})
        )
        return index

    def test_one_is_read(self, stranger: Stranger, index: Path) -> None:
        stranger.convert()

    @pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", "", "a\0b", 3, None, ["a"], {"a": 1}])
    def test_a_name_that_leads_elsewhere_is_refused(self, stranger: Stranger, index: Path, name: Any) -> None:
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        stranger.refused(stranger.convert, f"{index} names the shard ")

    @pytest.mark.parametrize("link", ["../base/model.safetensors", "/etc/passwd", "a-loop"])
    def test_a_link_out_of_the_directory_is_refused(self, stranger: Stranger, index: Path, link: str) -> None:
        target = index.with_name("a.safetensors")
        target.unlink()
        target.symlink_to(link if link != "a-loop" else "a.safetensors")
        stranger.refused(stranger.convert, f"{target}")

    def test_links_of_the_hugging_face_cache_are_followed(self, stranger: Stranger, index: Path) -> None:
        repository = stranger.folder / "models--owner--name"
        (repository / "blobs").mkdir(parents=True)
        (repository / "snapshots").mkdir()
        index.parent.rename(repository / "snapshots" / "abc")
        shard = repository / "snapshots" / "abc" / "a.safetensors"
        shard.rename(repository / "blobs" / "0123")
        shard.symlink_to("../../blobs/0123")
        assert read_tensors(shard.parent)

    @pytest.mark.parametrize("weight_map", [None, [], {}, "a.safetensors", 3])
    def test_an_index_of_nothing_is_refused(self, stranger: Stranger, index: Path, weight_map: Any) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        stranger.refused(stranger.convert, "is not an index of shards")

    def test_a_pipe_is_not_waited_for(self, stranger: Stranger, index: Path) -> None:
        os.mkfifo(index.with_name("pipe.safetensors"))
        index.write_text(json.dumps({"weight_map": {"x": "pipe.safetensors"}}))
        stranger.refused(stranger.convert, "pipe.safetensors is no regular file")


@pytest.mark.parametrize(
    "name",
    [
        "research/model.safetensors",
        "research/args.json",
        "base/config.json",
        "base/generation_config.json",
        "base/tokenizer.json",
    ],
)
def test_no_pipe_is_waited_for(stranger: Stranger, name: str) -> None:
    file = stranger.folder / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    stranger.refused(stranger.convert, f"{file} is no regular file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_nor_by_init(stranger: Stranger, name: str) -> None:
    file = stranger.folder / "base" / name
    file.unlink()
    os.mkfifo(file)
    stranger.refused(stranger.init, f"{file} is no regular file")


def test_a_tokenizer_that_links_out_is_not_copied(stranger: Stranger) -> None:
    (stranger.folder / "base" / "tokenizer.json").symlink_to("/etc/passwd")
    stranger.refused(stranger.init, "is a link out of its directory, to /etc/passwd")


class TestJSON:
    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    )
    @pytest.mark.parametrize("name", ["research/args.json", "base/config.json", "base/generation_config.json"])
    def test_what_is_no_object_is_refused(self, stranger: Stranger, name: str, content: bytes) -> None:
        file = stranger.folder / name
        file.write_bytes(content)
        stranger.refused(stranger.convert, f"{file} ")

    def test_a_large_file_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(MOST_JSON + 1)
        with pytest.raises(ValueError, match="too many for a JSON file"):
            read_json(tmp_path / "config.json")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"lora": 3}, "`lora` is 3; it must be an object"),
            ({"lora": {"lora_alpha": "16"}}, "`lora_alpha` is '16'; it must be a number"),
            ({"lora_alpha": float("nan")}, "`lora_alpha` is nan; it must be a number"),
            ({"system": ["armt"]}, "a checkpoint of system ['armt'] cannot be converted"),
            ({"segment_size": 10**400}, "`segment_size` is "),
            ({"segment_size": "4"}, "`segment_size` is '4'; it must be an integer"),
            ({"correction": "false"}, "`correction` is 'false'; it must be true or false"),
            ({"wrap_layers": 5}, "`wrap_layers` was given as 5, but the checkpoint's tensors say [True, True]"),
        ],
    )
    def test_arguments_of_another_type_are_named(
        self, stranger: Stranger, fields: dict[str, Any], message: str
    ) -> None:
        change(stranger.folder / "research" / "args.json", **fields)
        stranger.refused(stranger.convert, message)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000; it must be an integer"),
            (
                {"num_hidden_layers": 4000},
                " of 2 layers, width 8, vocabulary 8, but",
            ),
            ({"hidden_size": 1 << 20}, "says a llama of 2 layers, width 1048576, vocabulary 8"),
            ({"vocab_size": 1 << 23}, "says a llama of 2 layers, width 8, vocabulary 8388608"),
            ({"intermediate_size": 1 << 23}, "mlp.down_proj.weight' has shape [8, 8]; by"),
            ({"head_dim": 1 << 23}, "self_attn.k_proj.weight' has shape [4, 8]; by"),
            ({"model_type": "gpt2"}, "says a gpt2 of 2 layers, width 8, vocabulary 8"),
            ({"model_type": "qwen3"}, "says a qwen3 of 2 layers"),
            ({"rope_parameters": {"rope_type": "no"}}, "config"),
            ({"hidden_act": "no"}, "KeyError"),
        ],
    )
    @pytest.mark.parametrize("command", ["convert", "init"])
    def test_a_base_model_of_other_sizes_is_told_from_its_tensors(
        self, stranger: Stranger, command: str, fields: dict[str, Any], message: str
    ) -> None:
        change(stranger.folder / "base" / "config.json", **fields)
        stranger.refused(getattr(stranger, command), message)

    def test_generation_parameters_of_another_type_are_one_sentence(self, stranger: Stranger) -> None:
        change(stranger.folder / "base" / "generation_config.json", num_beams="many", temperature=[1])
        stranger.refused(stranger.init, "transformers can't ")


class TestSafetensors:
    @pytest.mark.parametrize(
        "header",
        [
            struct.pack("<Q", 1 << 63),
            struct.pack("<Q", 1 << 40),
            struct.pack("<Q", 3) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 2) + b"\xff\xff",
            b"",
        ],
    )
    def test_a_damaged_header_is_refused(self, stranger: Stranger, header: bytes) -> None:
        file = stranger.folder / "research" / "model.safetensors"
        file.write_bytes(header)
        stranger.refused(stranger.convert, f"{file} cannot be read, it is damaged or truncated: ")

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]},
            {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        ],
    )
    def test_a_shape_that_the_file_does_not_hold_is_refused(self, stranger: Stranger, entry: dict[str, Any]) -> None:
        header = json.dumps({"memory_cell.memory": entry}).encode()
        file = stranger.folder / "research" / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        stranger.refused(stranger.convert, f"{file} cannot be read")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bool])
    @pytest.mark.parametrize("command", ["convert", "init"])
    def test_tensors_of_no_dtype_of_weights_are_refused(
        self, stranger: Stranger, command: str, dtype: torch.dtype
    ) -> None:
        file = stranger.folder / ("research" if command == "convert" else "base") / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, file)
        stranger.refused(getattr(stranger, command), f"{dtype}")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("command", ["convert", "init"])
    def test_weights_that_are_no_numbers_are_named(self, stranger: Stranger, command: str, value: float) -> None:
        file = stranger.folder / ("research" if command == "convert" else "base") / "model.safetensors"
        tensors = load_file(file)
        next(tensor for name, tensor in tensors.items() if name.endswith("up_proj.weight"))[3, 3] = value
        save_file(tensors, file)
        said = stranger.refused(getattr(stranger, command), "holds NaN or infinity")
        assert "up_proj.weight" in said

    @pytest.mark.parametrize("gone", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
    def test_init_names_a_tensor_that_the_base_model_lacks(self, stranger: Stranger, gone: str) -> None:
        file = stranger.folder / "base" / "model.safetensors"
        tensors = load_file(file)
        del tensors[gone]
        save_file(tensors, file)
        stranger.refused(stranger.init, f"Missing tensor '{gone}', judged by {file.with_name('config.json')}")

    def test_init_names_one_too_many(self, stranger: Stranger) -> None:
        file = stranger.folder / "base" / "model.safetensors"
        save_file(load_file(file) | {"score.weight": torch.ones(2, 2)}, file)
        stranger.refused(stranger.init, "Unexpected tensor 'score.weight'")

    def test_init_takes_a_file_without_a_head_and_with_old_constants(self, stranger: Stranger) -> None:
        folder = stranger.folder / "base"
        tensors = load_file(folder / "model.safetensors")
        change(folder / "config.json", tie_word_embeddings=True)
        body = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        body["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        save_file(body, folder / "model.safetensors")
        stranger.init()
        made = load_file(stranger.dst / "model.safetensors")
        assert torch.equal(made["model.model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


class TestPickles:
    @pytest.fixture
    def file(self, stranger: Stranger) -> Path:
        (stranger.folder / "research" / "model.safetensors").unlink()
        return stranger.folder / "research" / "pytorch_model.bin"

    def test_one_is_read(self, stranger: Stranger, file: Path) -> None:
        torch.save(stranger.research_tensors(), file)
        stranger.convert()

    def test_code_is_not_run(self, stranger: Stranger, file: Path) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(stranger.folder / "was-run"),)

        for content in (pickle.dumps({"a": Payload()}), _zipped(pickle.dumps({"a": Payload()}))):
            file.write_bytes(content)
            stranger.refused(stranger.convert, f"{file} cannot be read")

    @pytest.mark.parametrize(
        "content", [b"", b"\x80\x02}", b"\x80\x02.", b"cos\nsystem\n.", b"\x80\x02(lp0\n", b"PK\x03\x04", b"a" * 100]
    )
    def test_damage_is_one_sentence(self, stranger: Stranger, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        said = stranger.refused(stranger.convert, f"{file} cannot be read")
        assert "weights_only" not in said

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.ones(1).expand(1 << 40),
            torch.ones(2, 2).to_sparse(),
            torch.empty(1 << 40, device="meta"),
            torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        ],
        ids=["expanded", "sparse", "meta", "nested"],
    )
    def test_a_tensor_larger_than_its_file_is_refused(self, stranger: Stranger, file: Path, tensor: Any) -> None:
        torch.save(stranger.research_tensors() | {"memory_cell.memory": tensor}, file)
        stranger.refused(stranger.convert, f"{file} ")

    def test_names_that_are_none_are_refused(self, stranger: Stranger, file: Path) -> None:
        torch.save(stranger.research_tensors() | {3: torch.ones(1)}, file)
        stranger.refused(stranger.convert, "not a state dict")

    def test_what_a_zip_inflates_is_not_read(self, stranger: Stranger, file: Path) -> None:
        torch.save(stranger.research_tensors(), file)
        with zipfile.ZipFile(file) as stored, zipfile.ZipFile(f"{file}.small", "w", zipfile.ZIP_DEFLATED) as deflated:
            for member in stored.infolist():
                deflated.writestr(member.filename, stored.read(member))
        Path(f"{file}.small").rename(file)
        stranger.refused(stranger.convert, f"{file} cannot be read")

    @pytest.mark.parametrize(("A", "B"), [((0, 8), (8, 0)), ((8,), (8,)), ((2, 7), (8, 2))])
    def test_lora_of_other_shapes_is_refused(
        self, stranger: Stranger, file: Path, A: tuple[int, ...], B: tuple[int, ...]
    ) -> None:
        tensors = stranger.research_tensors()
        name = "memory_cell.model.model.layers.0.layer.mlp.up_proj"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.lora_A.default.weight": torch.ones(A), f"{name}.lora_B.default.weight": torch.ones(B)}
        torch.save(tensors, file)
        stranger.refused(lambda: stranger.convert(lora_alpha=1.0), "The LoRA adapter of ")


def _zipped(data: bytes) -> bytes:
    """What torch.save writes around a pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return content.getvalue()
