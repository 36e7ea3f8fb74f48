"""A small store of memories for tests: pages whose content tells which text they are of, a clock, and damage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_armt.memories.disk.manifest import Boundary, Manifest, Model
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.disk.tensorfile import Spec

S = 4
MODEL = Model("f" * 16, "small", {"weights": "one", "dtype": "float32"}, {"vllm-armt": "0"})
OTHER_MODEL = Model("e" * 16, "small", {"weights": "two", "dtype": "float32"})
SPEC: Spec = {
    "layers.0.M": (torch.float32, (3, 5)),
    "layers.0.z": (torch.bfloat16, (3,)),
    "layers.1.M": (torch.float32, (3, 5)),
    "seen": (torch.int64, ()),
}


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def open_store(directory: Path, model: Model = MODEL, **options: Any) -> Store:
    return Store(directory, model, **options)


def again(store: Store) -> Store:
    """The same folder as another server sees it."""
    return open_store(store.directory, store.model, clock=store.clock, grace=0)


def names(store: Store, **options: Any) -> dict[str, str | None]:
    """Of a tenant's memories, by id."""
    return {memory.id: memory.name for memory in store.list(**options)[0]}


def page_of(key: str) -> dict[str, torch.Tensor]:
    """The state of a page, which its key decides: a page in another's place is seen."""
    seed = int(key[:12], 16)
    return {
        name: (torch.arange(max(torch.Size(shape).numel(), 1), dtype=torch.float64) * (i + 1) + seed % (1009 + i))
        .to(dtype)
        .reshape(shape)
        for i, (name, (dtype, shape)) in enumerate(SPEC.items())
    }


def is_page_of(key: str, tensors: dict[str, torch.Tensor]) -> bool:
    expected = page_of(key)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def read(ids: Sequence[int], after: Boundary | None = None, salt: str | None = None) -> Boundary:
    """The boundary after `ids`, of which all whole segments are closed."""
    start = Boundary.start(salt) if after is None else after
    prompt = [*start.last, *start.pending, *ids]
    return Boundary(**{name: getattr(start, name) for name in Boundary.model_fields}).read(
        prompt, len(prompt) // S * S, S
    )


def make(store: Store, ids: Sequence[int] = range(6), **options: Any) -> Manifest:
    """A complete memory of a text, read behind the parent's if one is given."""
    boundary = read(ids, options.get("parent"), options.get("salt"))
    if boundary.page is not None:
        store.pages.save(boundary.page, page_of(boundary.page))
    return store.create(boundary, **options)


def loads(store: Store, memory: Manifest) -> bool:
    """Is the page of a memory there, whole, and its own?"""
    return memory.page is None or is_page_of(memory.page, store.pages.load(memory.page, SPEC))


@contextmanager
def directory_in_ram() -> Iterator[Path]:
    """A directory where bringing a file to the disk costs nothing, for tests that do it by the thousand."""
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if os.access(ram, os.W_OK) else None) as directory:
        yield Path(directory)


def folder(store: Store) -> Path:
    return store.catalog.directory


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip a bit of a file, as a bad disk does: its times stay."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
