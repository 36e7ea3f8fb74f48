"""Other words for what bAbI's people do, in three parts: what a model learnt to understand is tested by others."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING

from vllm_armt.babilong.people import DROP, GO, TAKE

if TYPE_CHECKING:
    from vllm_armt.babilong.stories import Split

MORE: dict[tuple[str, ...], dict[Split, tuple[str, ...]]] = {
    GO: {
        "train": (
            "walked to",
            "ran to",
            "traveled to",
            "hurried to",
            "came to",
            "came back to",
            "returned to",
            "headed to",
            "drove to",
            "strolled to",
            "walked into",
            "went into",
            "entered",
            "has gone to",
            "moved back to",
            "has moved to",
            "now went to",
            "then moved to",
            "is now in",
            "sneaked into",
            "followed a noise to",
            "rode to",
            "climbed up to",
            "got to",
            "went straight to",
            "went over to",
            "flew to",
            "danced into",
            "arrived in",
            "turned back to",
            "swam to",
            "withdrew to",
            "moved into",
            "limped to",
        ),
        "validation": ("rushed to", "wandered to", "stepped into", "walked over to", "has returned to"),
        "test": ("crept to", "proceeded to", "ran into", "walked back to", "hurried back to", "has walked to"),
    },
    TAKE: {
        "train": ("collected", "lifted", "seized", "gathered up"),
        "validation": ("fetched",),
        "test": ("snatched", "took up"),
    },
    DROP: {
        "train": ("set down", "threw away", "let go of"),
        "validation": ("laid down",),
        "test": ("put aside", "cast away"),
    },
}
"""By bAbI's own verbs."""


def reworded(text: str, split: Split, random: Random) -> str:
    """A fact in other words of a part; a fact without such a verb as it is."""
    for verbs, others in MORE.items():
        match = re.fullmatch(rf"(\w+) (?:{'|'.join(sorted(verbs, key=len, reverse=True))}) (the .*)", text)
        if match:
            return f"{match[1]} {random.choice(others[split])} {match[2]}"
    return text
