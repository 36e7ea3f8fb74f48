"""Text that means nothing."""

from __future__ import annotations

from random import Random

SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo")


def sentences(random: Random, count: int) -> str:
    """Sentences of words that mean nothing, some of them questions, one in twenty with a name."""
    found = []
    for _ in range(count):
        words = ["".join(random.choices(SYLLABLES, k=random.randint(1, 3))) for _ in range(random.randint(3, 12))]
        if random.random() < 0.05:
            words[1] = "Mary"
        found.append(" ".join([words[0].capitalize(), *words[1:]]) + random.choice(".?!"))
    return "\n".join(found)
