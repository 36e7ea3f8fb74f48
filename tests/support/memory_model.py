"""A simple model of a store of memories, and what is compared with it; `disk/test_machine.py` drives it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.memory_store import SPEC, Clock, S, directory_in_ram, is_page_of, open_store, page_of
from vllm_armt.memories.disk.manifest import Boundary, ExpiresAfter
from vllm_armt.memories.errors import Missing, NotFound, TooLarge

GRACE = 50.0
BUDGET = 9_000
NAMES = ("war", "peace", "and")
SALTS = (None, "a", "b")


@dataclass
class Memory:
    """What the model knows of one."""

    id: str
    salt: str | None
    text: tuple[int, ...]
    name: str | None
    parent: str | None
    metadata: dict[str, str]
    expires: ExpiresAfter | None
    created: float
    used: float
    status: str = "completed"
    page: str | None = None
    source: str | None = None
    leases: list = field(default_factory=list)
    # of one in progress: what is read for it, the name that it is to inherit, and whether somebody changed it meanwhile
    more: tuple[int, ...] = ()
    inherits: str | None = None
    changed: bool = False

    def is_expired(self, now: float) -> bool:
        if self.expires is None or self.status == "in_progress":
            return False
        return (self.created if self.expires.anchor == "created_at" else self.used) + self.expires.seconds <= now


class ModelledStore(RuleBasedStateMachine):
    """A store and a model of it; the invariants compare all that can be seen of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = directory_in_ram()
        self.directory = self.stack.__enter__()
        self.clock = Clock()
        self.model: dict[str, Memory] = {}
        self.gone: set[str] = set()
        self.builds: dict = {}
        self.budget: int | None = None
        self.kept: dict[str, float] = {}

    @initialize(budget=st.sampled_from([None, BUDGET]))
    def open(self, budget) -> None:
        self.budget = budget
        self.restart()

    def teardown(self) -> None:
        for build in self.builds.values():
            build._end()
        for memory in self.model.values():
            for lease in memory.leases:
                lease.release()
        self.stack.__exit__(None, None, None)

    @rule()
    def restart(self) -> None:
        self.store = open_store(self.directory, clock=self.clock, grace=GRACE, max_bytes=self.budget)

    # what the model says --------------------------------------------------------------------------------------------

    def alive(self, memory: Memory) -> bool:
        """Does it keep others from its name?"""
        return memory.status in ("completed", "in_progress") and not memory.is_expired(self.clock.now)

    def owner(self, name, salt) -> Memory | None:
        return next((m for m in self.model.values() if (m.name, m.salt) == (name, salt)), None)

    def take(self, memory: Memory, name: str | None) -> None:
        if name is not None:
            owner = self.owner(name, memory.salt)
            if owner is not None:
                owner.name = None
        memory.name = name

    def forget(self, id: str) -> None:
        self.gone.add(id)
        for lease in self.model.pop(id).leases:
            lease.release()

    def tick(self) -> None:
        self.clock.advance(1)

    def save(self, boundary: Boundary) -> bool:
        """Save a page; what had to make room for it is struck off, if it was allowed to go."""
        if boundary.page is None:
            return True
        try:
            self.store.pages.save(boundary.page, page_of(boundary.page))
        except TooLarge:
            assert self.budget is not None
            return False
        finally:
            self.strike_off_evicted()
        return True

    def strike_off_evicted(self) -> None:
        """Compare what is left with what may have gone."""
        left = set(self.store.catalog.ids())
        evicted = [memory for id, memory in self.model.items() if id not in left]
        for memory in evicted:
            assert self.budget is not None
            assert memory.status != "in_progress"
            assert not memory.leases or memory.page is None
            assert memory.name is None or not self.alive(memory), "a named memory was evicted"
        # of two unnamed ones whose page is theirs alone, the one that was used later stays
        pages = [memory.page for memory in self.model.values()]
        for one in evicted:
            for other in self.model.values():
                apart = pages.count(other.page) == pages.count(one.page) == 1
                if other.id in left and apart and other.name is None and self.alive(one) and not other.leases:
                    assert other.status == "in_progress" or other.used >= one.used
        for memory in evicted:
            self.forget(memory.id)
        self.kept = {key: used for key, used in self.kept.items() if key in self.store.prefix}

    # what must hold ---------------------------------------------------------------------------------------------------

    @invariant()
    def what_is_seen_is_what_the_model_says(self) -> None:
        if not hasattr(self, "store"):
            return
        now = self.clock.now
        for salt in SALTS:
            listed, more = self.store.list(salt=salt, limit=1000)
            assert not more
            expected = {id: memory for id, memory in self.model.items() if memory.salt == salt}
            assert {memory.id for memory in listed} == expected.keys()
            for seen in listed:
                memory = expected[seen.id]
                status = "expired" if memory.is_expired(now) else memory.status
                assert (seen.status, seen.name, seen.parent) == (status, memory.name, memory.parent)
                assert (seen.metadata, seen.expires_after) == (memory.metadata, memory.expires)
                assert (seen.created_at, seen.last_used_at) == (memory.created, memory.used)
                if memory.status == "completed":
                    assert seen.tokens == len(memory.text)
                    assert (*seen.last, *seen.pending) == memory.text[max(len(memory.text) // S - 1, 0) * S :]
                    assert seen.page == memory.page
                    if seen.page is not None:
                        tensors = self.store.pages.load(seen.page, SPEC)
                        assert is_page_of(memory.source or seen.page, tensors)
                if status == "completed" and memory.name is not None:
                    assert self.store.get(memory.name, salt=salt) == seen
            for name in NAMES:
                if self.owner(name, salt) is None:
                    with pytest.raises(NotFound):
                        self.store.get(name, salt=salt)
        for id in list(self.gone)[:3]:
            with pytest.raises((NotFound, Missing)):
                self.store.get(id)

    @invariant()
    def nothing_is_damaged(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify() == []
