"""`vllm-armt memory`: memories made, asked and looked after on this machine."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_armt.cli.memory.engine as engine_module
from tests.support import small_hf
from tests.support.golden_cases import Golden
from tests.support.memories import memory_engine
from tests.support.memory_store import flip
from tests.support.tiny_checkpoint import add_tokenizer, encode, random_text, rendered
from vllm_armt.memories.checkpoint import fingerprint_of, introduce, known_models
from vllm_armt.memories.disk.manifest import Boundary, ExpiresAfter, Manifest, Model
from vllm_armt.memories.disk.store import Store

S = 16
TEXT = random_text(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ARMT with a tokenizer of characters and a chat template."""
    directory = tmp_path_factory.mktemp("cli") / "model"
    Golden("armt_hf_llama").copy_checkpoint(directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """Where the engine keeps memories."""
    return model.parent / "memories"


@pytest.fixture(scope="module")
def llm(model: Path, folder: Path) -> Iterator[Any]:
    """One engine for all commands that need one; a text of more than some 80 tokens takes several pieces."""
    with memory_engine(model, folder, skip_tokenizer_init=False, max_model_len=120) as llm:
        yield llm


@pytest.fixture
def engine(run, llm, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command that needs an engine, on that one; returns its JSON, or what it says on stderr if it fails."""

    @contextmanager
    def started(directory: Path, memories: Path, *_: object) -> Iterator[Any]:
        assert (directory, memories) == (model, folder)
        yield llm

    def engine(command: str, *words: object) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "engine", started)
            code, out, err = run("memory", command, model, *words, "--memories", folder, "--json")
        return json.loads(out) if code == 0 else err

    return engine


@pytest.fixture(scope="module")
def text_file(model: Path) -> Path:
    file = model.parent / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def built(engine, folder: Path, text_file: Path) -> dict[str, Any]:
    """The memory "text", made once."""
    made = [memory for memory in stored(folder) if memory.name == "text"]
    if made:
        return engine("show", "text")
    return engine("build", text_file, "--name", "text", "--metadata", "a=b=c", "--expires-after", 1000)


@pytest.fixture
def copy(built, run, model: Path, folder: Path, tmp_path: Path):
    """Run a command that needs no engine, on a copy of the folder; returns exit code, stdout and stderr."""
    memories = tmp_path / "copy"
    shutil.copytree(folder, memories)

    def copy(command: str, *words: object) -> tuple[int, str, str]:
        return run("memory", command, model, *words, "--memories", memories)

    copy.folder = memories  # type: ignore[attr-defined]
    return copy


def store_in(folder: Path) -> Store:
    (known,) = known_models(folder)
    return Store(folder, known)


def stored(folder: Path) -> list[Manifest]:
    return [memory for known in known_models(folder) for memory in Store(folder, known).catalog.scan()]


def test_a_text_longer_than_the_engine_takes_becomes_a_memory(built, folder: Path) -> None:
    assert (built["object"], built["status"], built["name"]) == ("memory", "completed", "text")
    assert (built["usage"]["total_tokens"], built["segments"]) == (300, 300 // S)
    assert (built["metadata"], built["expires_at"] - built["created_at"]) == ({"a": "b=c"}, 1000)
    assert store_in(folder).get("text").last == tuple(encode(TEXT)[288 - S : 288])


def test_texts_are_read_one_behind_the_other_and_from_standard_input(
    engine, built, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, last = tmp_path / "1", tmp_path / "3"
    first.write_text(TEXT[:100])
    last.write_text(TEXT[250:])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT[100:250].encode())))
    parts = engine("build", first, "-", last)
    store = store_in(folder)
    assert parts["name"] is None
    # of the same text, by its hash
    assert store.get(parts["id"]).content == store.get("text").content


def test_more_is_read_behind_a_memory_and_its_name_moves(engine, tmp_path: Path, text_file: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text(TEXT[:50])
    short = engine("build", more, "--name", "grows", "--metadata", "a=b")
    longer = engine("append", "grows", text_file, "--if-parent", short["id"])
    assert (longer["name"], longer["parent"], longer["usage"]["total_tokens"]) == ("grows", short["id"], 350)
    assert longer["metadata"] == short["metadata"]
    assert engine("show", short["id"])["name"] is None
    said = engine("append", "grows", text_file, "--if-parent", short["id"])
    assert said.startswith("error: Somebody was faster")


def test_a_question_is_a_message_where_there_is_a_chat_template_and_plain_text_if_asked_for(engine, built, llm) -> None:
    first, second = engine("ask", "text", "who?", "where?", "--max-tokens", 4)
    assert (first["question"], first["memory"]["id"], first["memory"]["tokens"]) == ("who?", built["id"], 300)
    assert first["usage"] == {
        "prompt_tokens": len(rendered([{"role": "user", "content": "who?"}])),
        "completion_tokens": 4,
    }
    assert second["question"] == "where?"
    (raw,) = engine("ask", built["id"], "who?", "--raw", "--max-tokens", 4)
    assert raw["usage"]["prompt_tokens"] == 4


def test_what_can_not_be_asked_or_built_is_said_in_a_sentence(engine, built, tmp_path: Path) -> None:
    assert engine("ask", "nobody", "who?") == "error: There is no memory 'nobody'.\n"
    said = engine("ask", "text", "w" * 100, "--raw")
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    empty = tmp_path / "empty"
    empty.write_text("")
    assert "is empty" in engine("build", empty)
    empty.write_bytes(b"abc\xff\xfe")
    assert "UTF-8" in engine("build", empty)
    empty.write_text("abc")
    assert "The name 'text' is taken" in engine("build", empty, "--name", "text")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "absent.txt"], "No such file or directory: 'absent.txt'"),
        (["build", "--name", "../x"], "can't be the name of a memory"),
        (["build", "--metadata", "a"], "--metadata is 'a'; write KEY=VALUE."),
        (["build", "--expires-after", "0"], "--expires-after is 0:"),
        (["build", "--engine", "["], "--engine is '[', which is not JSON"),
        (["build", "--engine", '{"additional_config": {}}'], "--engine can't hold additional_config"),
        (["build", "--memories-max-bytes", "x"], "--memories-max-bytes is 'x'; write a whole number"),
    ],
)
def test_bad_options_are_said_before_an_engine_starts(
    run, model: Path, text_file: Path, words: list[str], message: str
) -> None:
    files = [] if words[1].endswith(".txt") else [text_file]
    code, _, err = run("memory", words[0], model, *files, *words[1:], "--memories", "unused")
    assert (code, len(err.splitlines())) == (1, 1)
    assert message in err


def test_memories_are_listed_and_shown(copy, built) -> None:
    code, out, _ = copy("list", "--json")
    (listed,) = [memory for memory in json.loads(out)["data"] if memory["name"] == "text"]
    assert (code, listed["id"]) == (0, built["id"])
    code, out, _ = copy("list")
    assert built["id"] in out
    code, out, _ = copy("show", "text")
    assert "300 (18 segments and 12 tokens)" in out
    assert "b=c" in out
    code, _, err = copy("show", "nobody")
    assert (code, err) == (1, "error: There is no memory 'nobody' of this model in the folder.\n")


def test_of_other_dtypes_other_weights_and_other_salts_are_other_memories(
    copy, run, built, model: Path, tmp_path: Path
) -> None:
    assert json.loads(copy("list", "--dtype", "bfloat16", "--json")[1])["data"] == []
    assert json.loads(copy("list", "--dtype", "float32", "--json")[1])["data"] != []
    assert json.loads(copy("list", "--cache-salt", "mine", "--json")[1])["data"] == []
    other = tmp_path / "other"
    shutil.copytree(model, other)
    flip(other / "model.safetensors", -1)
    code, out, _ = run("memory", "list", other, "--memories", copy.folder, "--json")
    assert (code, json.loads(out)["data"]) == (0, [])


def test_several_memories_of_one_name_are_told_apart_by_dtype(copy, built) -> None:
    # as a server in bfloat16 would leave one
    identity = dict(store_in(copy.folder).model.identity) | {"dtype": "bfloat16"}
    other = Store(copy.folder, Model(fingerprint_of(identity), "other", identity))
    introduce(other)
    memory = other.create(Boundary.start().read([3, 4], 0, S), name="text")
    code, _, err = copy("show", "text")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "is the name of several memories, of dtypes bfloat16, float32. Give --dtype, or an id." in err
    assert json.loads(copy("show", "text", "--dtype", "bfloat16", "--json")[1])["id"] == memory.id
    assert json.loads(copy("show", built["id"], "--json")[1])["id"] == built["id"]


def test_rm_deletes_all_or_nothing(copy, built) -> None:
    code, _, err = copy("rm", "text", "nobody")
    assert (code, err) == (1, "error: There is no memory 'nobody' of this model in the folder.\n")
    assert copy("show", "text")[0] == 0
    assert copy("rm", "text")[:2] == (0, f"{built['id']}\n")
    assert copy("show", "text")[0] == 1


def test_expired_memories_are_refused_and_collected(copy, built) -> None:
    store = store_in(copy.folder)
    store.update("text", expires_after=ExpiresAfter(anchor="created_at", seconds=1))
    time.sleep(max(0.0, built["created_at"] + 2.01 - time.time()))
    assert copy("show", "text")[2] == "error: The memory 'text' has expired.\n"
    assert json.loads(copy("gc", "--json")[1])["expired"] == 1
    assert store.catalog.read(built["id"]) is None
    assert "freed" in copy("gc")[1]


def test_expired_memories_can_be_deleted(copy, built) -> None:
    store_in(copy.folder).update("text", expires_after=ExpiresAfter(anchor="created_at", seconds=1))
    time.sleep(max(0.0, built["created_at"] + 2.01 - time.time()))
    assert copy("rm", "text")[:2] == (0, f"{built['id']}\n")


def test_verify_finds_damage_and_discards_it(copy) -> None:
    assert copy("verify") == (0, "All is as it was written.\n", "")
    store = store_in(copy.folder)
    key = store.get("text").page
    assert key is not None
    page = store.pages.path(key)
    flip(page, -1)
    code, out, _ = copy("verify")
    assert code == 1
    assert str(page) in out
    code, out, _ = copy("verify", "--discard", "--json")
    assert code == 0
    assert [(found["path"], found["discarded"]) for found in json.loads(out)] == [(str(page), True)]
    assert not page.exists()


def test_a_memory_goes_to_another_folder_as_one_file(copy, run, built, model: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "text.memory", tmp_path / "new" / "memories"
    assert copy("export", "text", file)[0] == 0
    assert copy("export", "text", file)[2].startswith(f"error: {file} exists.")
    code, out, err = run("memory", "import", model, file, "--memories", other, "--name", "taken", "--json")
    assert code == 0, err
    taken = json.loads(out)
    assert (taken["id"], taken["name"], taken["usage"]) == (built["id"], "taken", built["usage"])
    assert json.loads(run("memory", "list", model, "--memories", other, "--json")[1])["data"] == [taken]
    code, _, err = run("memory", "import", model, file, "--memories", other, "--name", "taken")
    assert (code, "The name 'taken' is taken" in err) == (1, True)
    code, _, err = run(
        "memory", "import", model, file, "--memories", other, "--name", "more", "--memories-max-bytes", "1k"
    )
    assert (code, "max_bytes" in err) == (1, True)


def test_a_memory_goes_through_a_pipe(copy, run, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(buffer=(pipe := io.BytesIO()), flush=lambda: None))
        copy("export", "text", "-")
    pipe.seek(0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
    code, out, err = run("memory", "import", model, "-", "--memories", tmp_path / "other", "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "text"


def test_an_archive_of_another_model_is_refused(copy, run, model: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "text.memory", tmp_path / "other"
    copy("export", "text", file)
    shutil.copytree(model, other)
    flip(other / "model.safetensors", -1)
    code, _, err = run("memory", "import", other, file, "--memories", tmp_path / "new")
    assert (code, err) == (1, f"error: The archive is of another model than {other}: its weights differ.\n")
    file.write_bytes(file.read_bytes()[:100])
    code, _, err = run("memory", "import", model, file, "--memories", tmp_path / "new")
    assert (code, err.startswith("error: This can't be imported.")) == (1, True)


def test_folders_that_are_none_are_said(run, model: Path, tmp_path: Path) -> None:
    code, _, err = run("memory", "list", model, "--memories", tmp_path / "absent")
    assert (code, err) == (1, f"error: --memories is {tmp_path / 'absent'}, which is no folder.\n")
    code, _, err = run("memory", "list", tmp_path, "--memories", tmp_path)
    assert (code, err) == (1, f"error: {tmp_path} is no checkpoint: it has no config.json.\n")


def test_what_needs_no_engine_does_not_wait_for_vllm(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys, vllm_armt.cli\n"
        f"sys.argv = ['vllm-armt', 'memory', 'verify', {str(model)!r}, '--memories', {str(tmp_path)!r}]\n"
        "try: vllm_armt.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'vllm', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_are_those_of_the_state_and_of_the_keys(run) -> None:
    code, out, _ = run("memory", "sizes", "--shape", "llama-1b", "--tokens", "10k", "--json")
    (row,) = json.loads(out)
    # 16 layers, K = 6 * 64 rows of M and z, float32; keys and values of 8 heads of 64 in bfloat16
    assert row["memory_bytes"] == 16 * 384 * (2048 + 1) * 4
    # three pages of whole rows of M, one more than the memory's 384 for z
    assert row["request_bytes"] == 3 * 16 * 385 * 2048 * 4
    assert row["kv_cache_bytes"] == {"10000": 10_000 * 16 * 2 * 8 * 64 * 2}
    assert code == 0
    code, out, _ = run("memory", "sizes")
    assert "llama-8b" in out


@pytest.mark.parametrize(
    "kind",
    [
        small_hf.Small("rmt", "llama"),
        small_hf.Small("rmt", "gpt2", {"wrap_pos": True, "sliding_window": True}),
        small_hf.Small("prmt", "llama"),
    ],
    ids=lambda kind: kind.name,
)
def test_sizes_are_known_of_systems_without_matrices(run, tmp_path: Path, kind: small_hf.Small) -> None:
    config = kind.build().config
    kind.build().save_pretrained(tmp_path)
    code, out, _ = run("memory", "sizes", "--model", tmp_path, "--dtype", "float32", "--tokens", "10", "--json")
    (row,) = json.loads(out)
    # of every layer the memory tokens, and with a window keys and values of the segment
    base = config.base_model_config
    rows = small_hf.M_TOKENS + (2 * small_hf.S if kind.has_window else 0)
    assert row["memory_bytes"] == base.num_hidden_layers * rows * base.hidden_size * 4
    assert (code, row["d_mem"]) == (0, None)
    code, out, _ = run("memory", "sizes", "--model", tmp_path)
    assert code == 0
