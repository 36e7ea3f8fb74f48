"""The store against a simple model of it, in random orders of all that can be done.

`MEMORY_STEPS=10000 python -m pytest tests/memories/disk/test_machine.py` makes as many steps or some more.
"""

from __future__ import annotations

import io
import os
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    consumes,
    multiple,
    precondition,
    rule,
)

from tests.support.memory_model import NAMES, SALTS, Memory, ModelledStore
from tests.support.memory_store import SPEC, S, page_of, read
from vllm_armt.memories.disk.archive import export_memory, import_memory
from vllm_armt.memories.disk.manifest import ExpiresAfter
from vllm_armt.memories.errors import Conflict, Expired, NotFound, TooLarge

STEPS = int(os.environ.get("MEMORY_STEPS", "600"))
A_RUN = 40

salts = st.sampled_from([None, *SALTS])
names = st.sampled_from(NAMES)
texts = st.lists(st.integers(0, 3), max_size=3 * S)
expiries = st.none() | st.builds(
    ExpiresAfter, anchor=st.sampled_from(["created_at", "last_used_at"]), seconds=st.integers(1, 200)
)
metadatas = st.dictionaries(st.sampled_from(["k", "l"]), st.text(max_size=5), max_size=2)


class StoreMachine(ModelledStore):
    """Each rule does one thing to the store and to the model."""

    memories = Bundle("memories")

    @rule(seconds=st.integers(1, 120))
    def wait(self, seconds) -> None:
        self.clock.advance(seconds)

    @rule(target=memories, text=texts, name=st.none() | names, salt=salts, metadata=metadatas, expires=expiries)
    def create(self, text, name, salt, metadata, expires):
        self.tick()
        boundary = read(text, salt=salt)
        if not self.save(boundary):
            return multiple()
        owner = self.owner(name, salt) if name else None
        create = lambda: self.store.create(  # noqa: E731
            boundary, name=name, salt=salt, metadata=metadata, expires_after=expires
        )
        if owner is not None and self.alive(owner):
            with pytest.raises(Conflict) as error:
                create()
            assert error.value.current == owner.id
            return multiple()
        made = create()
        now = self.clock.now
        memory = Memory(made.id, salt, tuple(text), None, None, metadata, expires, now, now, page=boundary.page)
        self.model[made.id] = memory
        self.take(memory, name)
        return made.id

    @rule(target=memories, id=memories, text=texts, name=st.none() | names | st.just("keep"), stale=st.booleans())
    def append(self, id, text, name, stale):
        self.tick()
        parent = self.model.get(id)
        if parent is None or parent.status != "completed" or parent.is_expired(self.clock.now):
            return multiple()
        before = self.store.get(id, salt=parent.salt)
        options = {} if name == "keep" else {"name": name}
        wanted = parent.name if name == "keep" else name
        moved = False
        if stale and parent.name is not None:
            # somebody else takes the name between the look-up and the append
            self.store.update(id, name=None, salt=parent.salt)
            moved = name in ("keep", before.name)
            parent.name = None
        boundary = read(text, before)
        with self.store.use(id, salt=parent.salt):
            parent.used = self.clock.now
            if not self.save(boundary):
                return multiple()
        create = lambda: self.store.create(boundary, parent=before, salt=parent.salt, **options)  # noqa: E731
        owner = self.owner(wanted, parent.salt) if wanted else None
        taken = owner is not None and self.alive(owner) and owner is not parent
        if moved or (name != "keep" and taken):
            with pytest.raises(Conflict):
                create()
            return multiple()
        made = create()
        now = self.clock.now
        memory = replace(
            parent, id=made.id, text=parent.text + tuple(text), name=None, parent=id, created=now, used=now, leases=[]
        )
        memory.page = boundary.page
        if parent.source is not None and boundary.page != parent.page:
            memory.source = None
        self.model[made.id] = memory
        self.take(memory, wanted)
        return made.id

    @rule(target=memories, id=memories, text=texts)
    def begin(self, id, text):
        self.tick()
        parent = self.model.get(id)
        if parent is None or parent.status != "completed" or parent.is_expired(self.clock.now):
            return multiple()
        build = self.store.begin(parent=self.store.get(id, salt=parent.salt), salt=parent.salt, total=len(text))
        now = self.clock.now
        child = replace(parent, id=build.id, name=None, parent=id, created=now, used=now, leases=[], changed=False)
        child.status, child.inherits, child.more = "in_progress", parent.name, tuple(text)
        self.model[build.id] = child
        self.builds[build.id] = build
        return build.id

    @precondition(lambda self: self.builds)
    @rule(choice=st.randoms(use_true_random=False), how=st.sampled_from(["complete", "complete", "fail", "die"]))
    def end(self, choice: random.Random, how):
        self.tick()
        id = choice.choice(list(self.builds))
        build = self.builds[id]
        memory = self.model.get(id)
        if memory is None:
            with pytest.raises(NotFound):
                build.fail("deleted")
            del self.builds[id]
            return
        if how == "complete":
            assert memory.parent is not None
            boundary = read(memory.more, build.parent)
            if not self.save(boundary):
                return
            inherits = memory.inherits if memory.name is None else None
            owner = self.owner(inherits, memory.salt) if inherits else None
            if inherits and (owner is None or owner.id != memory.parent):
                with pytest.raises(Conflict):
                    build.complete(boundary)
                if owner is None or owner.status != "completed" or owner.is_expired(self.clock.now):
                    with pytest.raises((Conflict, NotFound)):
                        build.rebase()
                    how = "fail"
                else:
                    assert build.rebase().id == owner.id
                    memory.text, memory.parent, memory.page = owner.text, owner.id, owner.page
                    memory.source = owner.source
                    if not memory.changed:
                        memory.metadata, memory.expires = owner.metadata, owner.expires
                    return
            else:
                build.complete(boundary)
                parent = self.model.get(memory.parent)
                if parent is not None and not memory.changed:
                    memory.metadata, memory.expires = parent.metadata, parent.expires
                memory.text += memory.more
                if boundary.page != memory.page:
                    memory.source = None
                memory.page, memory.status = boundary.page, "completed"
                if inherits:
                    self.take(memory, inherits)
        if how == "fail":
            build.fail("for a test")
            memory.status = "failed"
        if how == "die":
            os.close(build._fd)
            build._fd = None
            memory.status = "failed"
        del self.builds[id]

    @rule(id=memories, change=st.sampled_from(["name", "metadata", "expires"]), name=st.none() | names,
          metadata=metadatas, expires=expiries)  # fmt: skip
    def update(self, id, change, name, metadata, expires) -> None:
        self.tick()
        memory = self.model.get(id)
        if memory is None:
            with pytest.raises(NotFound):
                self.store.update(id, metadata=metadata)
            return
        options = {"name": {"name": name}, "metadata": {"metadata": metadata}, "expires": {"expires_after": expires}}
        call = lambda: self.store.update(id, salt=memory.salt, **options[change])  # noqa: E731
        if memory.is_expired(self.clock.now):
            with pytest.raises(Expired):
                call()
            return
        owner = self.owner(name, memory.salt) if name else None
        if change == "name" and owner is not None and owner is not memory and self.alive(owner):
            with pytest.raises(Conflict):
                call()
            return
        call()
        if change == "name":
            self.take(memory, name)
        elif change == "metadata":
            memory.metadata = metadata
            memory.changed = True
        else:
            memory.expires = expires
            memory.changed = True

    @rule(id=memories, by_name=st.booleans())
    def use(self, id, by_name) -> None:
        self.tick()
        memory = self.model.get(id)
        reference = memory.name if memory is not None and by_name and memory.name else id
        salt = memory.salt if memory is not None else None
        if memory is None:
            with pytest.raises(NotFound):
                self.store.use(reference, salt=salt)
        elif memory.is_expired(self.clock.now):
            with pytest.raises(Expired):
                self.store.use(reference, salt=salt)
        elif memory.status != "completed":
            with pytest.raises(Conflict):
                self.store.use(reference, salt=salt)
        else:
            lease = self.store.use(reference, salt=salt)
            assert lease.memory.id == id
            memory.leases.append(lease)
            memory.used = self.clock.now

    @rule(id=memories)
    def release(self, id) -> None:
        if id in self.model and self.model[id].leases:
            self.model[id].leases.pop().release()

    @rule(id=memories, other=salts)
    def ask_with_another_salt(self, id, other) -> None:
        memory = self.model.get(id)
        if memory is not None and memory.salt != other:
            for ask in (self.store.get, self.store.use, self.store.delete, self.store.update):
                with pytest.raises(NotFound):
                    ask(id, salt=other)

    @rule(id=consumes(memories))
    def delete(self, id) -> None:
        memory = self.model.get(id)
        if memory is None:
            with pytest.raises(NotFound):
                self.store.delete(id)
            return
        assert self.store.delete(id, salt=memory.salt).id == id
        self.forget(id)

    @rule(target=memories, id=memories, name=st.none() | names, salt=salts)
    def export_and_import(self, id, name, salt):
        self.tick()
        memory = self.model.get(id)
        if memory is None or memory.status != "completed" or memory.is_expired(self.clock.now):
            return multiple()
        data = b"".join(export_memory(self.store, id, salt=memory.salt))
        memory.used = self.clock.now
        self.tick()
        owner = self.owner(name, salt) if name else None
        call = lambda: import_memory(self.store, io.BytesIO(data), name=name, salt=salt, expected=SPEC)  # noqa: E731
        if owner is not None and self.alive(owner):
            with pytest.raises(Conflict):
                call()
            return multiple()
        try:
            made = call()
        except TooLarge:
            assert self.budget is not None
            return multiple()
        now = self.clock.now
        new = replace(memory, id=made.id, salt=salt, name=None, parent=None, created=now, used=now, leases=[])
        new.page = made.page
        new.source = memory.source or memory.page
        self.model[made.id] = new
        self.strike_off_evicted()
        self.take(new, name)
        return made.id

    @rule(key=st.sampled_from(["12", "34", "56"]).map(lambda pair: pair * 16))
    def keep_a_page(self, key) -> None:
        self.tick()
        try:
            self.store.prefix.save(key, page_of(key))
        except TooLarge:
            assert self.budget is not None
        else:
            self.kept[key] = self.clock.now
        self.strike_off_evicted()

    @rule()
    def collect(self) -> None:
        self.store.gc()
        for id, memory in list(self.model.items()):
            if memory.is_expired(self.clock.now):
                self.forget(id)

    @rule()
    def leave_rubbish(self) -> None:
        """What a killed process leaves: half a page, and a page without a manifest."""
        (self.store.pages.directory / ".rubbish.tmp").write_bytes(b"half")
        try:
            self.store.pages.save("99" * 32, page_of("99" * 32))
        except TooLarge:
            assert self.budget is not None
        self.strike_off_evicted()


StoreMachine.TestCase.settings = settings(
    # a run makes some 35 steps on average
    max_examples=STEPS // 32,
    stateful_step_count=A_RUN,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
test_the_store_does_what_a_simple_model_of_it_does = StoreMachine.TestCase
