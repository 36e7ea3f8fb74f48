"""Several servers on one folder."""

import json
import os
import threading

from tests.support.forks import exit_status, fork
from tests.support.memory_store import S, loads, make, open_store, page_of, read
from vllm_armt.memories.disk.manifest import chain
from vllm_armt.memories.errors import Conflict, NotFound

CLIENTS, APPENDS = 4, 5


def append_by_turns(store, ids):
    """As a server does without `if_parent`: behind whatever has the name, again if that has moved on."""
    while True:
        with store.use("war") as lease:
            boundary = read(ids, lease.memory)
            store.pages.save(boundary.page, page_of(boundary.page))
            try:
                return store.create(boundary, parent=lease.memory, if_parent=lease.memory.id)
            except Conflict as conflict:
                if conflict.current == lease.memory.id:
                    raise


def append_by_build(store, ids):
    with store.begin(parent=store.get("war"), total=len(ids)) as build:
        while True:
            boundary = read(ids, build.parent)
            store.pages.save(boundary.page, page_of(boundary.page))
            try:
                return build.complete(boundary)
            except Conflict:
                build.rebase()


def serve(directory, server, report):
    store = open_store(directory)
    failures = []

    def client(number):
        try:
            for turn in range(APPENDS):
                ids = [server, number, turn, 7]
                made = (append_by_turns if number % 2 else append_by_build)(store, ids)
                os.write(report, json.dumps([made.id, ids]).encode() + b"\n")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_eight_clients_of_two_servers_append_to_one_name_and_no_update_is_lost(tmp_path):
    store = open_store(tmp_path)
    first = make(store, [0] * S, name="war")
    reader, writer = os.pipe()
    servers = [fork(lambda server=server: serve(tmp_path, server, writer)) for server in range(2)]
    os.close(writer)
    with open(reader) as reports:
        made = {id: tuple(ids) for id, ids in map(json.loads, reports)}
    assert [exit_status(server) for server in servers] == [0, 0]
    assert len(made) == 2 * CLIENTS * APPENDS

    history = [store.get("war")]
    while history[-1].parent is not None:
        history.append(store.get(history[-1].parent))
    assert history.pop().id == first.id
    history.reverse()
    # every append that was said to be done is in the history of the name, once, and each is what its client sent
    assert [memory.id for memory in history] == sorted(made, key=[memory.id for memory in history].index)
    content = first.content
    for segments, memory in enumerate(history, start=2):
        assert memory.last == made[memory.id]
        content = chain(content, memory.last)
        assert (memory.content, memory.segments, memory.name is None) == (content, segments, memory is not history[-1])
        assert loads(store, memory)
    assert store.verify() == []


def test_one_name_asked_for_by_many_processes_at_once_is_given_to_one(tmp_path):
    store = open_store(tmp_path)
    boundary = read(range(6))
    store.pages.save(boundary.page, page_of(boundary.page))

    def ask():
        try:
            open_store(tmp_path).create(boundary, name="war")
        except Conflict:
            os._exit(3)

    assert sorted(exit_status(pid) for pid in [fork(ask) for _ in range(6)]) == [0, 3, 3, 3, 3, 3]
    assert len(store.list()[0]) == 1
    assert store.get("war").tokens == 6


def test_users_are_not_disturbed_by_eviction_and_deletion_in_another_process(tmp_path):
    """Whatever is found can be loaded as long as it is leased, while others make, evict and delete."""
    store = open_store(tmp_path)
    one = make(store, [0] * 6)
    budget = 4 * (one.bytes + store.catalog.path(one.id).stat().st_size)

    def churn():
        busy = open_store(tmp_path, grace=0, max_bytes=budget)
        for i in range(60):
            memory = make(busy, [i] * 6)
            if i % 3 == 0:
                busy.delete(memory.id)
            if i % 10 == 0:
                busy.gc()

    child = fork(churn)
    used = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        for memory in store.list()[0]:
            try:
                lease = store.use(memory.id)
            except NotFound:
                # evicted since it was listed
                continue
            with lease:
                assert loads(store, lease.memory)
                used += 1
    assert used > 10
    assert store.verify() == []


def test_stores_of_one_folder_may_be_opened_at_once(tmp_path):
    children = [fork(lambda: open_store(tmp_path / "new" / "folder")) for _ in range(3)]
    assert [exit_status(child) for child in children] == [0, 0, 0]
