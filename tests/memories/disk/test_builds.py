import errno
import os
import signal
import subprocess
import sys

import pytest

from tests.support.memory_store import loads, make, open_store, page_of, read
from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.manifest import ExpiresAfter
from vllm_armt.memories.errors import Conflict, InvalidInput, Missing, NotFound, StorageFailed


@pytest.fixture
def other(store, clock):
    return open_store(store.directory, clock=clock, grace=0)


def save(store, ids, after=None):
    boundary = read(ids, after)
    if boundary.page is not None:
        store.pages.save(boundary.page, page_of(boundary.page))
    return boundary


def test_a_build_is_seen_by_all_servers_from_its_beginning(store, other):
    with store.begin(name="war", metadata={"k": "v"}, total=20) as build:
        seen = other.get("war")
        assert (seen.id, seen.status, seen.progress, seen.metadata) == (build.id, "in_progress", (0, 20), {"k": "v"})
        build.progress(12, 20)
        assert other.list()[0][0].progress == (12, 20)
        with pytest.raises(Conflict, match="still being read"):
            other.use("war")
        with pytest.raises(Conflict, match="taken"):
            make(other, name="war")
        made = build.complete(save(store, range(20)))
    assert other.get("war") == made
    assert (made.status, made.tokens, made.progress, made.id) == ("completed", 20, None, build.id)
    assert list(store.catalog.builds.iterdir()) == []


def test_a_checkpoint_can_be_gone_on_from_by_any_process_and_its_page_stays(store, other):
    with store.begin(name="war") as build:
        build.checkpoint(save(store, range(6)))
        other.gc()
        with other.use(build.id, unfinished=True) as lease:
            assert lease.memory.tokens == 6
            assert loads(other, lease.memory)
            build.complete(save(store, range(6, 11), lease.memory))
    assert other.get("war").tokens == 11
    assert other.get("war").content == read(range(11)).content


def test_a_checkpoint_or_end_without_its_page_is_refused_and_the_build_goes_on(store):
    with store.begin(name="war") as build:
        for attempt in (build.checkpoint, build.complete):
            with pytest.raises(Missing):
                attempt(read(range(6)))
            with pytest.raises(InvalidInput):
                attempt(read(range(6), salt="other"))
        assert store.get("war").status == "in_progress"
        build.complete(save(store, range(6)))


def test_a_build_that_is_left_or_fails_says_why_and_frees_its_name(store, other):
    with pytest.raises(ValueError, match="secret"), store.begin(name="war") as build:
        raise ValueError("secret words of the text")
    seen = other.get("war")
    assert (seen.status, seen.id) == ("failed", build.id)
    assert "ValueError" in seen.error
    assert "secret" not in seen.error
    with pytest.raises(Conflict, match="ValueError"):
        other.use("war")
    build = store.begin(name="war")
    build.fail("It is too long." + "x" * 2000)
    assert other.get(build.id).error.startswith("It is too long.")
    assert make(other, name="war").name == "war"
    assert other.get(build.id).name is None


def test_an_append_in_progress_leaves_the_name_to_its_parent_until_it_completes(store, other):
    first = make(store, name="war")
    with store.begin(parent=first) as build:
        assert other.get("war") == first
        assert (other.get(build.id).name, other.get(build.id).parent, other.get(build.id).tokens) == (None, first.id, 6)
        build.complete(save(store, [7], first))
    assert other.get("war").id == build.id
    with store.begin(parent=other.get("war")) as build:
        pass
    assert other.get("war").status == "completed"


def test_a_build_that_was_overtaken_reads_again_behind_the_winner(store, other):
    first = make(store, name="war", metadata={"k": "old"})
    with store.begin(parent=first) as build:
        winner = make(other, [8, 9], parent=first, metadata={"k": "new"})
        boundary = save(store, [7], first)
        with pytest.raises(Conflict) as error:
            build.complete(boundary)
        assert error.value.current == winner.id
        assert store.get(build.id).status == "in_progress"
        parent = build.rebase()
        assert parent == winner
        with pytest.raises(InvalidInput):
            build.complete(read([], first))
        made = build.complete(save(store, [7], parent))
    assert (made.id, made.parent, made.name, made.metadata) == (build.id, winner.id, "war", {"k": "new"})
    assert made.content == read([*range(6), 8, 9, 7]).content
    assert made.tokens == 9


def test_a_build_whose_name_is_gone_can_not_be_rebased(store, other):
    first = make(store, name="war")
    with store.begin(parent=first) as build:
        other.delete("war")
        with pytest.raises(Conflict, match="gone"):
            build.complete(save(store, [7], first))
        with pytest.raises(NotFound, match="'war'"):
            build.rebase()


def test_a_deleted_build_stops_and_stays_deleted(store, other):
    with store.begin(name="war") as build:
        other.delete("war")
        boundary = save(store, range(6))
        for attempt in (build.checkpoint, build.complete):
            with pytest.raises(NotFound, match="deleted while"):
                attempt(boundary)
    assert other.list() == ([], False)
    assert list(store.catalog.builds.iterdir()) == []


def test_what_is_changed_of_a_build_in_progress_stays(store, other):
    with store.begin(name="war", metadata={"k": "v"}) as build:
        other.update(
            "war", metadata={"k": "w"}, name="peace", expires_after=ExpiresAfter(anchor="created_at", seconds=9)
        )
        made = build.complete(save(store, range(6)))
    assert (made.name, made.metadata, made.expires_after.seconds) == ("peace", {"k": "w"}, 9)
    first = make(store, name="war")
    with store.begin(parent=first) as build:
        other.update(build.id, name="mine", metadata={"x": "y"})
        build.checkpoint(first.boundary)
        made = build.complete(save(store, [7], first))
    assert (made.name, made.metadata, other.get("war").id) == ("mine", {"x": "y"}, first.id)


def test_a_disk_that_fails_behind_the_commit_does_not_undo_it(store, monkeypatch):
    def complete_on_a_failing_disk(build, boundary):
        def fail_behind_the_commit(folder):
            if b'"completed"' in store.catalog.path(build.id).read_bytes():
                raise OSError(errno.EIO, "")

        with monkeypatch.context() as patch, build:
            patch.setattr(files, "sync_folder", fail_behind_the_commit)
            with pytest.raises(StorageFailed):
                build.complete(boundary)
            patch.undo()
            if build.parent.parent is not None:
                # whoever tries again is told that it is done
                assert build.complete(boundary).name == "war"

    first = make(store, name="war")
    build = store.begin(parent=first)
    complete_on_a_failing_disk(build, save(store, [7], first))
    second = store.get("war")
    assert (second.id, second.status) == (build.id, "completed")
    build = store.begin(parent=second)
    complete_on_a_failing_disk(build, save(store, [8], second))
    assert (store.get("war").id, store.get("war").status) == (build.id, "completed")


def test_options_may_be_given_when_it_completes(store):
    first = make(store, name="war", roles=("user",))
    with store.begin(parent=first) as build:
        made = build.complete(save(store, [7], first), roles=("user", "assistant"), metadata={"k": "v"})
    assert (made.roles, made.metadata) == (("user", "assistant"), {"k": "v"})


def test_a_build_whose_process_was_killed_is_failed_for_all(store):
    first = make(store, name="war")
    code = f"""
import sys, time
from pathlib import Path
from tests.support.memory_store import open_store
store = open_store(Path({str(store.directory)!r}))
builds = store.begin(name="new", total=5), store.begin(parent=store.get("war"))
print(*(build.id for build in builds), flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    new, append = child.stdout.readline().split()
    assert [store.get(id).status for id in (new, append)] == ["in_progress"] * 2
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for id in (new, append):
        assert store.get(id).status == "failed"
        assert "ended" in store.get(id).error
    assert make(store, [9], name="new").name == "new"
    assert make(store, [9], parent=first).name == "war"
    store.gc()
    assert list(store.catalog.builds.iterdir()) == []


def test_a_build_that_can_not_begin_leaves_nothing(store):
    make(store, name="war")
    with pytest.raises(Conflict):
        store.begin(name="war")
    assert len(store.list()[0]) == 1
    assert list(store.catalog.builds.iterdir()) == []


def test_only_a_complete_memory_is_continued(store):
    with store.begin(name="war") as build, pytest.raises(Conflict, match="in_progress"):
        store.begin(parent=store.get("war"))
    with pytest.raises(Conflict, match="failed"):
        store.begin(parent=store.get(build.id))
