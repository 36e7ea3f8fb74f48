import os

import pytest

from tests.support.memory_store import MODEL, OTHER_MODEL, flip, folder, loads, make, open_store, page_of, read
from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import ExpiresAfter
from vllm_armt.memories.disk.upkeep import FAILED_SECONDS, Collected
from vllm_armt.memories.errors import Missing, NotFound, StorageFailed, TooLarge

SECOND = ExpiresAfter(anchor="created_at", seconds=1)


def one_more(store):
    """Bytes that one more memory with a page of its own needs, with some to spare."""
    memory = make(store, [99] * 6)
    bytes = memory.bytes + store.catalog.path(memory.id).stat().st_size
    store.delete(memory.id)
    return bytes + 100


def ids(store):
    return {memory.id for memory in store.list(limit=1000)[0]}


def limit(store, memories):
    """Let the store have room for so many memories."""
    store.max_bytes = memories * one_more(store)


# the budget -----------------------------------------------------------------------------------------------------------


def test_usage_counts_every_file_of_pages_and_manifests(store):
    make(store, name="war")
    make(store, [1])
    store.prefix.save("12" * 16, page_of("12" * 16))
    parts = ("pages", "prefix", "memories")
    assert store.usage() == sum(path.stat().st_size for part in parts for path in (folder(store) / part).iterdir())


def test_the_least_recently_used_of_unnamed_memories_makes_room(store, clock):
    limit(store, 3)
    made = []
    for i in range(3):
        clock.advance(1)
        made.append(make(store, [i] * 6))
    clock.advance(1)
    store.use(made[0].id).release()
    made.append(make(store, [7] * 6))
    assert ids(store) == {made[i].id for i in (0, 2, 3)}
    assert store.usage() <= store.max_bytes
    assert made[1].page not in store.pages
    assert all(loads(store, memory) for memory in store.list()[0])


def test_pages_of_the_second_tier_make_room_by_last_load_among_unnamed_memories(store, clock):
    limit(store, 2)
    keys = [f"{i:02}" * 16 for i in range(3)]
    for key in keys[:2]:
        clock.advance(1)
        store.prefix.save(key, page_of(key))
    clock.advance(1)
    unnamed = make(store)
    clock.advance(1)
    store.prefix.load(keys[0], {name: (t.dtype, tuple(t.shape)) for name, t in page_of(keys[0]).items()})
    clock.advance(1)
    make(store, [7] * 6)
    assert [key in store.prefix for key in keys[:2]] == [True, False]
    make(store, [8] * 6)
    assert unnamed.id not in ids(store)
    assert keys[0] in store.prefix


def test_named_memories_go_only_when_they_expired_and_after_all_unnamed(store, clock):
    limit(store, 3)
    expired = make(store, [0] * 6, name="expired", expires_after=SECOND)
    named = make(store, [1] * 6, name="named")
    clock.advance(2)
    unnamed = make(store, [2] * 6)
    make(store, [3] * 6, name="new")
    assert unnamed.id not in ids(store)
    assert expired.id in ids(store)
    make(store, [4] * 6, name="newer")
    assert expired.id not in ids(store)
    before = ids(store)
    with pytest.raises(TooLarge, match="max_bytes") as error:
        make(store, [5] * 6)
    assert error.value.status == 413
    assert ids(store) == before
    assert named.id in before
    assert all(loads(store, memory) for memory in store.list()[0])


def test_of_unnamed_memories_expired_ones_go_before_those_that_can_be_used(store, clock):
    limit(store, 2)
    old = make(store, [0] * 6)
    clock.advance(1)
    expired = make(store, [1] * 6, expires_after=SECOND)
    clock.advance(2)
    make(store, [2] * 6)
    assert old.id in ids(store)
    assert expired.id not in ids(store)


def test_nothing_is_evicted_for_what_could_not_fit_anyway(store):
    limit(store, 3)
    for i in range(2):
        make(store, [i] * 6)
    before = ids(store)
    boundary = read([9] * 6)
    big = {name: tensor.repeat(40, *[1] * max(tensor.dim() - 1, 0)) for name, tensor in page_of(boundary.page).items()}
    with pytest.raises(TooLarge):
        store.pages.save(boundary.page, big)
    assert ids(store) == before
    assert len(list((folder(store) / "pages").iterdir())) == 2


def test_what_is_in_use_in_another_process_stays(store, clock):
    limit(store, 2)
    used, other = make(store, [0] * 6), make(store, [1] * 6)
    with open_store(store.directory, clock=clock).use(used.id) as lease:
        clock.advance(1)
        store.use(other.id).release()
        make(store, [2] * 6, name="two")
        assert used.id in ids(store)
        assert other.id not in ids(store)
        with pytest.raises(TooLarge):
            make(store, [3] * 6)
        assert loads(store, lease.memory)
    make(store, [3] * 6)
    assert used.id not in ids(store)


def test_a_page_that_a_named_memory_shares_stays(store, clock):
    limit(store, 2)
    unnamed, named = make(store), make(store, name="war")
    clock.advance(1)
    make(store, [1] * 6)
    make(store, [2] * 6)
    assert {unnamed.id, named.id} < ids(store)
    assert loads(store, named)


def test_the_checkpoint_of_a_build_in_progress_stays_and_so_does_what_it_continues(store, clock):
    limit(store, 2)
    parent = make(store)
    with store.begin(parent=parent) as build:
        make(store, [1] * 6, name="one")
        with pytest.raises(TooLarge):
            make(store, [2] * 6)
        assert loads(store, store.get(build.id))
        assert loads(store, store.get(parent.id))
        build.fail("enough")
    make(store, [2] * 6, name="two")
    assert not {build.id, parent.id} & ids(store)


def test_a_page_that_waits_for_its_manifest_is_left_alone_for_the_grace(tmp_path, clock):
    store = open_store(tmp_path, clock=clock, grace=60)
    boundary = read(range(6))
    store.pages.save(boundary.page, page_of(boundary.page))
    other = open_store(tmp_path, clock=clock, grace=60)
    clock.advance(59)
    other.max_bytes = store.usage() + 10
    with pytest.raises(TooLarge):
        make(other, [7] * 6)
    other.max_bytes = None
    other.gc()
    memory = store.create(boundary)
    store.delete(memory.id)
    assert boundary.page in store.pages
    clock.advance(1)
    other.gc()
    assert boundary.page not in store.pages


def test_a_page_saved_again_is_safe_from_the_deletion_of_the_memory_that_had_it(tmp_path, clock):
    store = open_store(tmp_path, clock=clock, grace=60)
    old = make(store)
    clock.advance(100)
    boundary = read(range(6))
    store.pages.save(boundary.page, page_of(boundary.page))
    store.delete(old.id)
    assert loads(store, store.create(boundary))


# gc -------------------------------------------------------------------------------------------------------------------


def test_gc_removes_what_nobody_needs_and_nothing_else(store, clock):
    kept = make(store, [0] * 6, name="kept")
    make(store, [1] * 6, name="expired", expires_after=SECOND)
    store.begin(name="failed").fail("for a test")
    orphan = "ab" * 32
    store.pages.save(orphan, page_of(orphan))
    store.prefix.save(orphan, page_of(orphan))
    for part in ("pages", "prefix", "memories", "names"):
        (folder(store) / part / ".0.tmp").write_bytes(b"12345")
    assert store.gc().temporary == 4
    assert orphan not in store.pages
    assert orphan in store.prefix
    clock.advance(2)
    done = store.gc()
    assert (done.expired, done.failed, done.pages) == (1, 0, 1)
    clock.advance(FAILED_SECONDS)
    assert store.gc().failed == 1
    assert store.gc() == Collected()
    assert ids(store) == {kept.id}
    assert loads(store, store.get("kept"))
    assert store.verify() == []


def test_gc_removes_a_name_that_leads_nowhere(store):
    memory = make(store, name="war")
    store.catalog.path(memory.id).unlink()
    assert store.gc().names == 1
    assert list(store.catalog.names.iterdir()) == []


def test_gc_leaves_the_files_of_live_writers_and_live_builds(store):
    with files.new_file(folder(store) / "pages" / ("ab" * 32 + ".safetensors"), 0) as fd, store.begin(name="war"):
        os.write(fd, b"half")
        assert open_store(store.directory, grace=0).gc() == Collected()
        assert store.get("war").status == "in_progress"


def test_gc_leaves_held_pages_and_pages_while_a_manifest_is_damaged(store):
    memory = make(store, name="war")
    with store.use("war"):
        store.delete("war")
        assert store.gc().pages == 0
    assert store.gc().pages == 1
    memory = make(store, name="war")
    flip(store.catalog.path(memory.id), 100)
    assert store.gc().pages == 0
    flip(store.catalog.path(memory.id), 100)
    assert loads(store, store.get("war"))


def test_gc_does_not_touch_other_models_or_what_links_point_to(store, tmp_path):
    elsewhere = open_store(store.directory, OTHER_MODEL, grace=0)
    memory = make(elsewhere, name="war")
    outside = tmp_path / "outside"
    outside.write_text("")
    (folder(store) / "pages" / ".x.tmp").symlink_to(outside)
    (folder(store) / "pages" / ("ab" * 32 + ".safetensors")).symlink_to(outside)
    store.gc()
    assert outside.exists()
    assert loads(elsewhere, elsewhere.get(memory.id))
    assert MODEL.fingerprint != OTHER_MODEL.fingerprint


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_names_each_damaged_or_missing_file_and_discard_removes_it(store):
    made = [make(store, [i] * 6, name=f"n{i}") for i in range(6)]
    store.prefix.save("12" * 16, page_of("12" * 16))
    assert store.verify() == []
    flip(store.catalog.path(made[0].id), 90)
    flip(store.pages.path(made[1].page), 600)
    store.pages.path(made[2].page).unlink()
    with open(store.pages.path(made[3].page), "r+b") as file:
        file.truncate(100)
    flip(store.catalog.name_path("n4", None), 3)
    flip(store.prefix.path("12" * 16), 500)
    found = {(finding.path.parent.name, finding.path.name): finding for finding in store.verify()}
    page = "{}.safetensors".format
    assert {place: finding.memory for place, finding in found.items()} == {
        ("memories", f"{made[0].id}.json"): made[0].id,
        ("names", "n0.json"): None,
        ("names", "n4.json"): None,
        ("pages", page(made[1].page)): made[1].id,
        ("pages", page(made[2].page)): made[2].id,
        ("pages", page(made[3].page)): made[3].id,
        ("prefix", page("12" * 16)): None,
    }
    assert isinstance(found["pages", page(made[2].page)].error, Missing)
    for finding in found.values():
        store.discard(finding)
    for memory in made[1:4]:
        with pytest.raises(Missing):
            store.use(memory.id)
        store.delete(memory.id)
    store.update(made[4].id, name="n4")
    store.gc()
    assert store.verify() == []
    assert ids(store) == {made[4].id, made[5].id}
    with pytest.raises(NotFound):
        store.get(made[0].id)


def test_verify_can_check_the_layout_too(store):
    memory = make(store, name="war")
    (finding,) = store.verify({})
    assert (finding.memory, "expected absent" in str(finding.error)) == (memory.id, True)


# disks ----------------------------------------------------------------------------------------------------------------


def test_a_lock_that_stays_taken_is_an_error_in_the_end(store, monkeypatch):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.05)
    with files.locked(store.catalog.lock), pytest.raises(StorageFailed, match="has been locked"):
        store.gc()
    store.gc()
