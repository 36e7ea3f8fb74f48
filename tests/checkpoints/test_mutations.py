"""Whatever a file holds, convert, init, doctor and the hook take it or refuse it in one sentence, and soon."""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strangers import Stranger

SECONDS = 10
"""That no file may take."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**9, 1 << 63, 10**400, 0.5, 1e308, math.nan, math.inf),
    *("", "false", "no", "../../x", "/etc/passwd", "a\0b", "é" * 1000, "__class__", "gpt2", "qwen3", "bfloat16"),
    *([], {}, [[]], [None], [1, "a"], {"a": {"b": []}}, [[["global"], 10**9]], {"__float__": "NaN"}),
]
KEYS = ["foo_bar", "__class__", "to_dict", "num_labels", "id2label", "per_layer_config", "quantization_config"]
KEYS += ["attention_types", "layer_types", "rope_scaling", "pruned_heads", "auto_map", "dtype", "sliding_window"]

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    return Stranger.make(tmp_path_factory.mktemp("whole"))


@st.composite
def mutated(draw: st.DrawFn, raw: dict[str, Any]) -> dict[str, Any]:
    """An object of which one to three values, somewhere inside, are others, gone, or new."""
    changed = copy.deepcopy(raw)
    for _ in range(draw(st.integers(1, 3))):
        inner = draw(st.sampled_from(list(_objects(changed))))
        key = draw(st.sampled_from([*inner, *KEYS]))
        if draw(st.integers(0, 4)):
            inner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            inner.pop(key, None)
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes, first: int) -> bytes:
    """Bytes of which some among the first are others, or that end early, or go on."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, min(first, len(data)) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, None, 0, 7, 8, 9, first, -1, -100]))
    return bytes(data[:cut]) + draw(st.sampled_from([b"", b"", b"\0" * 9]))


def holds(stranger: Stranger, call: Callable[[], object]) -> None:
    """Check that the call ends soon, in nothing or in one sentence, and leaves nothing unfinished."""
    start = time.monotonic()
    try:
        call()
    except (ValueError, OSError) as error:
        said = str(error)
        assert said
        assert "\n" not in said
        assert len(said) < 2500
    assert time.monotonic() - start < SECONDS
    shutil.rmtree(stranger.dst, ignore_errors=True)
    assert not [path for path in stranger.folder.iterdir() if path.name.startswith(".")]


def check(stranger: Stranger, name: str, content: bytes, call: Callable[[], object]) -> None:
    """`holds` with other content of a file, which is put back."""
    file = stranger.folder / name
    kept = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content)
        holds(stranger, call)
    finally:
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ours/config.json", "open_config"),
        ("ours/config.json", "doctor"),
        ("older/config.json", "convert_older"),
        ("base/config.json", "convert"),
        ("base/config.json", "init"),
        ("base/generation_config.json", "init"),
        ("research/args.json", "convert"),
    ],
)
def test_configurations(whole: Stranger, name: str, command: str) -> None:
    raw = json.loads((whole.folder / name).read_text())

    @few
    @given(mutated(raw))
    def run(changed: dict[str, Any]) -> None:
        check(whole, name, json.dumps(changed).encode(), getattr(whole, command))

    run()


def test_indexes(whole: Stranger) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(whole.research_tensors(), "model.safetensors")}

    @few
    @given(mutated(index))
    def run(changed: dict[str, Any]) -> None:
        name = "research/model.safetensors.index.json"
        check(whole, name, json.dumps(changed).encode(), lambda: whole.convert(name))

    run()


@pytest.mark.parametrize(("folder", "command"), [("research", "convert"), ("ours", "doctor")])
def test_headers_of_safetensors(whole: Stranger, folder: str, command: str) -> None:
    name = f"{folder}/model.safetensors"
    content = (whole.folder / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    headers = mutated(json.loads(content[8 : 8 + length]))
    contents = st.one_of(headers.map(lambda header: _with_header(header, content[8 + length :])), damaged(content, 600))

    @few
    @given(contents)
    def run(changed: bytes) -> None:
        check(whole, name, changed, getattr(whole, command))

    run()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(whole: Stranger, zipped: bool) -> None:
    file = whole.folder / "pickled.bin"
    torch.save(whole.research_tensors(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.unlink()

    @few
    @given(damaged(content, 3000))
    def run(changed: bytes) -> None:
        check(whole, "pickled.bin", changed, lambda: whole.convert("pickled.bin"))

    run()


def _with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _objects(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield raw
    for value in raw.values():
        if isinstance(value, dict):
            yield from _objects(value)
