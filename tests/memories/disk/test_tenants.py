"""Memories of a cache_salt, which nobody else sees."""

from __future__ import annotations

import pytest

from tests.support.memory_store import (
    folder,
    make,
    read,
)
from vllm_armt.memories.errors import (
    NotFound,
)


@pytest.mark.parametrize(("mine", "other"), [("a", None), (None, "a"), ("a", "b")])
def test_a_memory_of_another_salt_is_not_found_by_anything(store, mine, other):
    memory = make(store, name="war", salt=mine)
    before = folder(store) / "memories" / f"{memory.id}.json"
    text = before.read_bytes()
    for reference in ("war", memory.id):
        for attempt in (store.get, store.use, store.delete):
            with pytest.raises(NotFound):
                attempt(reference, salt=other)
        with pytest.raises(NotFound):
            store.update(reference, salt=other, name="peace")
    with pytest.raises(NotFound):
        store.create(read([7], memory), parent=memory, salt=other)
    with pytest.raises(NotFound):
        store.begin(parent=memory, salt=other)
    with pytest.raises(NotFound):
        store.list(salt=other, after=memory.id)
    assert store.list(salt=other) == ([], False)
    assert before.read_bytes() == text
    assert store.get("war", salt=mine) == memory


def test_tenants_may_use_one_name_and_share_no_page(store):
    made = {salt: make(store, name="war", salt=salt) for salt in (None, "a", "b")}
    assert len({memory.page for memory in made.values()}) == 3
    for salt, memory in made.items():
        assert store.get("war", salt=salt).id == memory.id
        assert [found.id for found in store.list(salt=salt)[0]] == [memory.id]
    store.delete("war", salt="a")
    assert store.get("war").id == made[None].id


def test_no_salt_stands_on_the_disk(store):
    make(store, name="war", salt="very secret")
    assert all(b"very secret" not in path.read_bytes() for path in folder(store).rglob("*") if path.is_file())
