"""Memories in the store: made, looked up, listed, used until they expire."""

from __future__ import annotations

import os
import threading

import pytest

from tests.support.memory_store import (
    MODEL,
    again,
    loads,
    make,
    names,
    read,
)
from vllm_armt.memories.disk.manifest import Boundary, ExpiresAfter
from vllm_armt.memories.errors import (
    Expired,
    InvalidInput,
    Missing,
    NotFound,
)


def test_a_memory_is_found_by_id_and_name_by_every_server_with_all_that_it_was_given(store, clock):
    expires = ExpiresAfter(anchor="created_at", seconds=60)
    made = make(store, range(10), name="war", roles=("user",), metadata={"k": "v"}, expires_after=expires)
    for found in (again(store).get("war"), again(store).get(made.id), *again(store).list()[0]):
        assert found == made
    assert (made.name, made.roles, made.metadata) == ("war", ("user",), {"k": "v"})
    assert (made.status, made.segments, made.tokens, made.pending) == ("completed", 2, 10, (8, 9))
    assert (made.created_at, made.last_used_at, made.expires_at) == (clock.now, clock.now, clock.now + 60)
    assert (made.model, made.identity, made.versions) == (MODEL.name, MODEL.identity, MODEL.versions)
    assert made.bytes == store.pages.path(made.page).stat().st_size
    assert loads(again(store), made)


def test_a_text_shorter_than_a_segment_needs_no_page(store):
    memory = make(store, [1, 2], name="short")
    assert (memory.page, memory.bytes, memory.tokens, memory.pending) == (None, 0, 2, (1, 2))
    with store.use("short") as lease:
        assert lease.memory.pending == (1, 2)


def test_equal_texts_share_a_page_and_an_append_leaves_the_old_one(store):
    one, two = make(store), make(store)
    assert one.page == two.page
    longer = make(store, range(6, 20), parent=one)
    assert longer.page != one.page
    assert make(store, range(20)).page == longer.page
    assert loads(store, one)
    assert loads(store, longer)
    store.delete(one.id)
    assert loads(store, two)


def test_an_unknown_memory_is_not_found(store):
    for reference in ("war", "mem_" + "0" * 32):
        for attempt in (store.get, store.use, store.delete, store.update):
            with pytest.raises(NotFound, match="no memory") as error:
                attempt(reference)
            assert error.value.status == 404


def test_a_memory_is_not_made_before_its_page(store):
    boundary = read(range(6))
    with pytest.raises(Missing):
        store.create(boundary, name="war")
    assert store.list() == ([], False)
    make(store, name="war")


def test_a_boundary_of_another_salt_or_text_is_refused(store):
    for boundary, salt in ((read(range(6), salt="a"), None), (read(range(6)), "a"), (Boundary.start("a"), "b")):
        with pytest.raises(InvalidInput):
            store.create(boundary, salt=salt)
    parent = make(store, range(8))
    for boundary in (read(range(6)), read(range(1, 9)), read(range(1, 13))):
        with pytest.raises(InvalidInput):
            store.create(boundary, parent=parent)


def test_memories_are_listed_newest_first_in_pages(store, clock):
    made = []
    for i in range(7):
        clock.advance(1)
        made.insert(0, make(store, [i]).id)
    seen, after, more = [], None, True
    while more:
        found, more = store.list(after=after, limit=3)
        after = found[-1].id
        seen += [memory.id for memory in found]
    assert seen == made
    assert store.list(limit=7)[1] is False
    for limit in (0, 1001, -1):
        with pytest.raises(InvalidInput):
            store.list(limit=limit)
    with pytest.raises(NotFound):
        store.list(after="mem_" + "0" * 32)


def test_a_use_is_noted_without_a_change_of_the_file(store, clock):
    memory = make(store, name="war")
    text = store.catalog.path(memory.id).read_bytes()
    clock.advance(5)
    store.use("war").release()
    assert store.get("war").last_used_at == clock.now
    assert again(store).list()[0][0].last_used_at == clock.now
    assert store.catalog.path(memory.id).read_bytes() == text
    clock.advance(5)
    assert store.update("war", metadata={"k": "v"}).last_used_at == clock.now - 5


def test_uses_and_changes_at_once_lose_no_change(store):
    memory = make(store, name="war")
    stop = threading.Event()

    def use():
        while not stop.is_set():
            store.use("war").release()

    user = threading.Thread(target=use)
    user.start()
    for i in range(50):
        again(store).update("war", metadata={"i": str(i)})
        assert store.get("war").metadata == {"i": str(i)}
    stop.set()
    user.join()
    assert store.get(memory.id).metadata == {"i": "49"}


def test_a_use_while_a_change_is_written_is_not_lost(store, clock, monkeypatch):
    memory = make(store, name="war")
    rename = os.rename

    def use_first(*args):
        clock.advance(1)
        store.catalog.touch(memory)
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", use_first)
        store.update("war", metadata={"k": "v"})
    found = store.get("war")
    assert (found.metadata, found.last_used_at) == ({"k": "v"}, clock.now)
    assert clock.now > memory.last_used_at


@pytest.mark.parametrize("anchor", ["created_at", "last_used_at"])
def test_a_memory_expires_after_it_was_made_or_last_used(store, clock, anchor):
    memory = make(store, name="war", expires_after=ExpiresAfter(anchor=anchor, seconds=10))
    clock.advance(9)
    store.use("war").release()
    clock.advance(9)
    if anchor == "last_used_at":
        store.get("war")
        clock.advance(9)
    for reference in ("war", memory.id):
        for attempt in (store.get, store.use, store.update):
            with pytest.raises(Expired) as error:
                attempt(reference)
            assert error.value.status == 410
    with pytest.raises(NotFound):
        store.get("war", salt="other")
    assert store.list()[0][0].status == "expired"
    assert store.delete("war").id == memory.id
    with pytest.raises(NotFound):
        store.get("war")


def test_an_expired_memory_answers_to_its_name_until_another_takes_it(store, clock):
    old = make(store, name="war", expires_after=ExpiresAfter(anchor="created_at", seconds=1))
    clock.advance(2)
    new = make(store, [9], name="war")
    assert store.get("war").id == new.id
    assert names(store) == {old.id: None, new.id: "war"}
    store.delete("war")
    with pytest.raises(NotFound):
        store.get("war")


def test_a_lease_outlives_the_deletion_of_its_memory(store):
    memory = make(store, name="war")
    with store.use("war") as lease:
        again(store).delete("war")
        assert loads(store, lease.memory)
        with pytest.raises(NotFound):
            store.get(memory.id)
    store.gc()
    assert memory.page not in store.pages


def test_a_page_gone_between_look_up_and_load_is_said_to_be_missing(store):
    memory = make(store, name="war")
    store.pages.path(memory.page).unlink()
    with pytest.raises(Missing, match="'war'"):
        store.use("war")
    with pytest.raises(Missing):
        loads(store, memory)
    assert store.get("war").status == "completed"
    make(store)
    assert loads(store, store.get("war"))
