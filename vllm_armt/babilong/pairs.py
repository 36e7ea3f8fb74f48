"""Pairs of keys and values: the associative retrieval tasks of the ARMT paper (arXiv 2407.04841, section 4.1)."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from vllm_armt.babilong.episodes import Episode, Question

SYMBOLS = tuple("abcdefghijklmnop")
"""16 of them, as in the paper."""


class Rewrite(Episode):
    """What was a key's last value? Keys return with new values; one symbol each, as the authors' scripts have it."""

    key_size: ClassVar[int] = 1

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.value: dict[str, tuple[str, int]] = {}

    def tell(self) -> bool:
        key = self._key()
        value = self.random.choice(SYMBOLS)
        self.value[key] = (value, self._say(f"{key}: {value}.", key[0]))
        return True

    def ask(self) -> Question | None:
        if not self.value:
            return None
        key, (value, fact) = self.random.choice(list(self.value.items()))
        return Question(f"{key}?", value, key[0], (fact,))

    def _key(self) -> str:
        return " ".join(self.random.choices(SYMBOLS, k=self.key_size))


class Remember(Rewrite):
    """What was a key's value? No key returns; three symbols each, so that there are 4096."""

    key_size: ClassVar[int] = 3

    def _key(self) -> str:
        while (key := super()._key()) in self.value:
            pass
        return key
