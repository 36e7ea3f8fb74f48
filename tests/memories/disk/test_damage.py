"""Damaged files, links and the memories of other models: found, said, and no trouble to others."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.support.memory_store import (
    MODEL,
    OTHER_MODEL,
    again,
    flip,
    make,
    open_store,
    read,
)
from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import Model
from vllm_armt.memories.errors import (
    Damaged,
    MemoriesError,
    NotFound,
    WrongModel,
)


def test_every_flipped_byte_of_a_manifest_or_name_is_found_and_others_are_not_disturbed(store):
    memory, other = make(store, name="war"), make(store, [9], name="peace")
    for path in (store.catalog.path(memory.id), store.catalog.name_path("war", None)):
        for position in range(path.stat().st_size):
            flip(path, position, position % 8)
            with pytest.raises(Damaged):
                again(store).use("war")
            if position % 50 == 0:
                assert again(store).get("peace") == other
                assert other in again(store).list()[0]
                with pytest.raises(Damaged):
                    make(store, [8], name="war")
            flip(path, position, position % 8)
    assert again(store).get("war") == memory


def test_a_manifest_cut_anywhere_is_found(store):
    memory = make(store, name="war")
    path = store.catalog.path(memory.id)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            store.get(memory.id)


def test_a_name_whose_file_is_damaged_can_be_given_again_by_id(store):
    memory = make(store, name="war")
    flip(store.catalog.name_path("war", None), 20)
    assert store.get(memory.id).name == "war"
    assert store.update(memory.id, name="war").name == "war"
    assert store.get("war").id == memory.id


def test_manifests_swapped_between_ids_or_models_are_found(store):
    one, two = make(store), make(store, [9])
    elsewhere = open_store(store.directory, OTHER_MODEL)
    paths = store.catalog.path(one.id), store.catalog.path(two.id)
    texts = [path.read_bytes() for path in paths]
    for path, text in zip(paths, reversed(texts), strict=True):
        path.write_bytes(text)
    for id in (one.id, two.id):
        with pytest.raises(Damaged, match="not at its place"):
            store.get(id)
    elsewhere.catalog.path(one.id).write_bytes(texts[0])
    with pytest.raises(Damaged, match=MODEL.fingerprint):
        elsewhere.get(one.id)


def test_a_memory_of_another_model_is_refused_with_what_differs(store):
    memory, secret = make(store, name="war"), make(store, name="peace", salt="a")
    elsewhere = open_store(store.directory, OTHER_MODEL)
    for reference in ("war", memory.id):
        for attempt in (elsewhere.get, elsewhere.use, elsewhere.update, elsewhere.delete):
            with pytest.raises(WrongModel, match="weights is 'one' there, 'two' here") as error:
                attempt(reference)
            assert error.value.status == 409
    for reference in ("peace", secret.id):
        with pytest.raises(NotFound):
            elsewhere.get(reference)
    nameless = open_store(store.directory, Model("d" * 16, MODEL.name, MODEL.identity))
    with pytest.raises(WrongModel, match=MODEL.fingerprint):
        nameless.get("war")
    with pytest.raises(NotFound):
        elsewhere.create(read([7], memory), parent=memory)


def test_a_link_or_file_in_a_folder_s_place_is_refused_at_the_start(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for part in (MODEL.fingerprint, f"{MODEL.fingerprint}/pages"):
        root = tmp_path / part.replace("/", "-")
        (root / part).parent.mkdir(parents=True)
        (root / part).symlink_to(outside)
        with pytest.raises(MemoriesError, match="no folder"):
            open_store(root)
    assert list(outside.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(MemoriesError):
        open_store(tmp_path / "file")


def test_linked_manifests_are_not_followed(store, tmp_path):
    memory = make(store, name="war")
    path = store.catalog.path(memory.id)
    outside = tmp_path / "outside.json"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(Damaged, match="no regular file"):
        store.get(memory.id)
    assert store.list() == ([], False)


def test_a_manifest_of_a_newer_format_is_refused(store):
    memory = make(store)
    path = store.catalog.path(memory.id)
    body = json.loads(files.unseal(path, path.read_bytes())) | {"format": 2}
    path.write_bytes(files.seal(json.dumps(body).encode()))
    with pytest.raises(Damaged, match="newer"):
        store.get(memory.id)


def test_nothing_of_a_text_stands_in_log_lines(store, caplog):
    caplog.set_level(logging.DEBUG)
    memory = make(store, [717171, 727272, 737373, 747474, 757575], name="war")
    make(store, [767676], parent=memory)
    store.use("war").release()
    store.gc()
    store.verify()
    store.delete("war")
    assert not any(f"{i}{i}{i}" in caplog.text for i in range(71, 77))


def test_the_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(open_store(tmp_path / "link"), name="war")
    assert open_store(Path(tmp_path / "real")).get("war").name == "war"
