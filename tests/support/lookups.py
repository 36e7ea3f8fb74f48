"""Counts how often texts are looked up: in the prefix cache, and in one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

from vllm.v1.core.block_pool import BlockPool

from tests.support import simulation


@dataclass
class Lookups:
    """So many.

    Attributes:
        pages: look-ups in the prefix cache.
        hashes: a segment's hash was compared with another, or looked up in a dict.
    """

    pages: int = 0
    hashes: int = 0

    def take(self) -> Lookups:
        """What was counted since the last time."""
        taken = Lookups(self.pages, self.hashes)
        self.pages = self.hashes = 0
        return taken


class CountedHash(bytes):
    """A segment's hash that counts what is done with it."""

    lookups: ClassVar[Lookups]

    def __eq__(self, other: object) -> bool:
        self.lookups.hashes += 1
        return bytes.__eq__(self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        self.lookups.hashes += 1
        return bytes.__hash__(self)


@contextmanager
def counted_lookups() -> Iterator[Lookups]:
    """Count the look-ups of simulations."""
    CountedHash.lookups = lookups = Lookups()
    look_up, make_hasher = BlockPool.get_cached_block, simulation.get_request_block_hasher

    def counted(*args, **kwargs):
        lookups.pages += 1
        return look_up(*args, **kwargs)

    def counting_hasher(*args) -> Callable:
        hash_blocks = make_hasher(*args)
        return lambda request: list(map(CountedHash, hash_blocks(request)))

    with (
        patch.object(BlockPool, "get_cached_block", counted),
        patch.object(simulation, "get_request_block_hasher", counting_hasher),
    ):
        yield lookups
