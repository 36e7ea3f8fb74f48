"""Processes that end and disks that refuse at any moment: what was said to be saved is, nothing half-made is seen."""

import errno
import io
import itertools
import os
import random
import shutil
import signal
import time

import pytest

from tests.support.forks import before_step, exit_status, fork
from tests.support.memory_store import (
    SPEC,
    S,
    directory_in_ram,
    folder,
    is_page_of,
    loads,
    make,
    open_store,
    page_of,
    read,
)
from vllm_armt.memories.disk.archive import export_memory, import_memory
from vllm_armt.memories.disk.manifest import ExpiresAfter
from vllm_armt.memories.errors import Conflict, Missing, NotFound, StorageFailed, StorageFull, TooLarge

KILLED = 9


def build(store):
    """An append in two pieces."""
    with store.begin(parent=store.get("war"), total=9) as build:
        boundary = read([5] * 5, build.parent)
        store.pages.save(boundary.page, page_of(boundary.page))
        build.checkpoint(boundary)
        longer = read([6] * 4, boundary)
        store.pages.save(longer.page, page_of(longer.page))
        build.complete(longer)


def evict(store):
    store.max_bytes = store.usage() + 700
    for i in range(3):
        make(store, [100 + i] * 6)


def import_war(store):
    data = b"".join(export_memory(store, "war"))
    import_memory(store, io.BytesIO(data), name="new")


OPERATIONS = {
    "create": lambda store: make(store, [9] * 6, name="new"),
    "append": lambda store: make(store, [9] * 6, parent=store.get("war")),
    "take the name of an expired memory": lambda store: make(store, [9] * 6, name="expired"),
    "rename": lambda store: store.update("war", name="new"),
    "take a name away": lambda store: store.update("war", name=None),
    "change metadata": lambda store: store.update("war", metadata={"k": "v"}),
    "delete": lambda store: store.delete("war"),
    "build": build,
    "evict": evict,
    "collect": lambda store: store.gc(),
    "import": import_war,
    "keep a page": lambda store: store.prefix.save("34" * 16, page_of("34" * 16)),
}


@pytest.fixture
def ram():
    with directory_in_ram() as directory:
        yield directory


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store with one of everything."""
    store = open_store(tmp_path_factory.mktemp("template") / "store", grace=0)
    first = make(store, name="war")
    make(store, [8], parent=first)
    make(store, [1] * 6, name="peace")
    make(store, [2] * 6, name="expired", expires_after=ExpiresAfter(anchor="created_at", seconds=1))
    for i in range(3, 5):
        make(store, [i] * 6)
    store.prefix.save("12" * 16, page_of("12" * 16))
    store.pages.save("ab" * 32, page_of("ab" * 32))
    os.utime(store.catalog.path(store.get("expired").id), (1, 1))
    time.sleep(1.1)
    return store.directory


def owners(store):
    found, _ = store.list(limit=1000)
    named = {memory.name: memory.id for memory in found if memory.name is not None}
    assert len(named) == sum(memory.name is not None for memory in found), "two memories have one name"
    return named


def check(store, imported="00" * 32):
    """All that is listed as complete is there, whole, and its own; nothing is damaged.

    Args:
        imported: content of a text whose state is right for a memory that was imported, too.
    """
    assert store.verify() == []
    for memory in store.list(limit=1000)[0]:
        assert memory.status in ("completed", "failed", "expired")
        if memory.status == "completed":
            assert loads(store, memory) or is_page_of(imported, store.pages.load(memory.page, SPEC))
            assert store.get(memory.id) == memory
            if memory.name is not None:
                assert store.get(memory.name) == memory
    return owners(store)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_crash_before_any_step_leaves_the_state_before_or_after(operation, template, ram):
    run = OPERATIONS[operation]
    before = owners(open_store(template))
    war = open_store(template).get("war").page
    step, seen, status = 0, [], KILLED
    while status == KILLED:
        directory = ram / str(step)
        shutil.copytree(template, directory)

        def crash(directory=directory, step=step):
            before_step(step, lambda: os._exit(KILLED))
            run(open_store(directory, grace=0))

        status = exit_status(fork(crash))
        store = open_store(directory, grace=0)
        names = check(store, war)
        # what it is not about stays; the rest is as before or as after, never between
        assert names["peace"] == before["peace"]
        seen.append(frozenset(names))
        old, new = before["war"], names.get("war")
        if operation in ("append", "build"):
            assert new == old or store.get(new).parent == old
        elif operation not in ("rename", "take a name away", "delete"):
            assert new == old
        if operation in ("rename", "take a name away"):
            assert store.get(old).status == "completed"
        if operation == "rename":
            assert {name for name, id in names.items() if id == old} in ({"war"}, {"new"})
        store.gc()
        names = check(store, war)
        left = [path for path in folder(store).rglob("*") if path.name.endswith(".tmp")]
        assert left == []
        assert list(store.catalog.builds.iterdir()) == []
        assert len(list(store.catalog.names.iterdir())) == len(names)
        shutil.rmtree(directory)
        step += 1
    assert status == 0
    assert step > 2, "nothing was interrupted"
    changes = [a != b for a, b in itertools.pairwise(seen)]
    assert sum(changes) <= 1, "the change went back and forth"


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_refuses_any_step_is_an_error_that_leaves_nothing_behind(
    operation, reason, template, ram, monkeypatch
):
    run = OPERATIONS[operation]
    step, errors, failed = 0, 0, True
    before = owners(open_store(template))
    war = open_store(template).get("war").page
    while failed:
        directory = ram / str(step)
        shutil.copytree(template, directory)
        store = open_store(directory, grace=0)

        def refuse():
            raise OSError(reason, os.strerror(reason))

        error = None
        with monkeypatch.context() as patch:
            # every second one: errors are tried at half the steps of the crashes
            reached = before_step(2 * step, refuse, patch.setattr)
            try:
                run(store)
            except StorageFailed as refused:
                error = refused
        # none: what tidies up behind a change that is saved may fail; the next change of the name repairs it
        assert error is None or isinstance(error, StorageFull) == (reason == errno.ENOSPC)
        assert error is None or os.strerror(reason) in str(error)
        errors += error is not None
        failed = reached()
        assert not [path for path in folder(store).rglob("*") if path.name.endswith(".tmp")]
        names = check(store, war)
        assert names["peace"] == before["peace"]
        if operation not in ("rename", "take a name away", "delete", "append", "build"):
            assert names["war"] == before["war"]
        shutil.rmtree(directory)
        step += 1
    assert errors > 1


def test_what_is_renamed_was_brought_to_the_disk_before_and_its_folder_after(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    done = []
    for name in ("fsync", "rename"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _n=name, _o=original: done.append(_n) or _o(*args))
    make(store, name="war")
    assert done == ["fsync", "rename", "fsync"] * 3


def test_a_folder_that_can_only_be_read_is_read_from_and_refuses_changes_in_words(tmp_path):
    if os.geteuid() == 0:
        # root may write everywhere
        nobody = 65534
        for parent in tmp_path.parents:
            if parent.owner() == "root" and parent.stat().st_mode & 0o005 == 0:
                parent.chmod(0o711)
    store = open_store(tmp_path / "store")
    memory = make(store, name="war")
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        if os.geteuid() == 0:
            os.chown(path, nobody, nobody)
        path.chmod(0o500 if path.is_dir() else 0o400)
    tmp_path.chmod(0o711)

    def read_only():
        if os.geteuid() == 0:
            os.seteuid(nobody)
        store = open_store(tmp_path / "store")
        with store.use("war") as lease:
            assert loads(store, lease.memory)
        assert [found.id for found in store.list()[0]] == [memory.id]
        assert store.verify() == []
        for attempt in (
            lambda: make(store, [9] * 6),
            lambda: store.create(read([1])),
            lambda: store.begin(),
            lambda: store.update("war", name="peace"),
            lambda: store.delete("war"),
            store.gc,
        ):
            with pytest.raises(StorageFailed, match="must be writable"):
                attempt()

    assert exit_status(fork(read_only)) == 0
    for path in (tmp_path / "store").rglob("*"):
        path.chmod(0o700)
    (tmp_path / "store").chmod(0o700)


# fifty kills ----------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def work(directory, report, seed):
    """Change memories at random, for ever; says before each change what it is about, and after it that it is done."""
    random.seed(seed)
    store = open_store(directory, grace=0, max_bytes=40_000)

    def say(*words):
        os.write(report, (" ".join(map(str, words)) + "\n").encode())

    while True:
        name = random.choice(NAMES)
        text = [random.randrange(1000) for _ in range(random.randrange(3 * S))]
        what = random.choice(("create", "append", "append", "build", "delete", "unnamed", "gc", "rename"))
        say("try", what, name)
        try:
            if what == "create":
                say("has", name, make(store, text, name=name).id)
            elif what == "append":
                say("has", name, make(store, text, parent=store.get(name)).id)
            elif what == "build":
                with store.begin(parent=store.get(name), total=len(text)) as build:
                    boundary = read(text, build.parent)
                    if boundary.page is not None:
                        store.pages.save(boundary.page, page_of(boundary.page))
                    build.checkpoint(boundary)
                    build.complete(boundary)
                say("has", name, build.id)
            elif what == "delete":
                store.delete(name)
                say("lost", name)
            elif what == "rename":
                say("has", name, store.update(store.get(name).id, metadata={"k": str(text)[:99]}).id)
            elif what == "unnamed":
                make(store, text)
            else:
                store.gc()
        except (Conflict, NotFound, TooLarge, Missing):
            pass
        say("done")


def test_killed_at_fifty_random_moments_nothing_is_lost_and_nothing_half_made_is_listed(ram):
    random.seed(5)
    has: dict[str, str] = {}
    moments = 0
    for round in range(50):
        reader, writer = os.pipe()
        child = fork(lambda writer=writer, round=round: work(ram, writer, round))
        os.close(writer)
        time.sleep(random.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) == -signal.SIGKILL
        with open(reader) as said:
            lines = [line.split() for line in said.read().splitlines()]
        doing = None
        for what, *words in lines:
            if what == "try":
                doing = words
            elif what == "has":
                has[words[0]] = words[1]
            elif what == "lost":
                has.pop(words[0])
            else:
                doing = None
                moments += 1
        store = open_store(ram, grace=0, max_bytes=40_000)
        names = check(store)
        for name in NAMES:
            if doing is not None and name == doing[1] and names.get(name) != has.get(name):
                # the change that was cut short may have been made, or not
                if name in names and name in has:
                    assert store.get(name).parent == has[name]
                else:
                    assert doing[0] == ("create" if name in names else "delete")
                has = {**has, name: names[name]} if name in names else {n: i for n, i in has.items() if n != name}
            assert names.get(name) == has.get(name)
        store.gc()
        check(store)
        assert not [path for path in folder(store).rglob("*") if path.name.endswith(".tmp")]
        assert store.usage() < 60_000
    assert moments > 200
