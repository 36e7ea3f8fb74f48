"""Other words for what bAbI's people do, in three parts: what a model learnt to understand is tested by others."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING

from vllm_armt.babilong.people import DROP, GO, TAKE

if TYPE_CHECKING:
    from vllm_armt.babilong.stories import Split

_WAYS = (
    "walked|ran|hurried|strolled|drove|rode|flew|danced|climbed|sneaked|limped|swam|sailed|jumped|hopped|raced|dashed|"
    "trotted|roamed|drifted|moved|withdrew|retired|headed|turned|came|got|went|slipped|slid|stumbled|staggered|paraded|"
    "paced|bolted|sped|cycled|skated|crawled|hiked|trudged|shuffled|galloped|stormed|advanced|retreated|escaped|fled|"
    "shifted|ambled|sauntered|hastened|scrambled|darted|returned|traveled|skipped|waded|paddled|lurched|swept|hobbled"
)

MORE: dict[tuple[str, ...], dict[Split, tuple[str, ...]]] = {
    GO: {
        "train": (
            f"[{_WAYS}] [to|into|over to|back to|straight to|up to|down to|out to|on to]",
            f"[{_WAYS}] to",
            "[has|had] [gone|moved|come|returned|walked|run|fled|traveled|hurried] [to|into|back to]",
            "[now|then|soon|quickly|slowly|quietly] [went|moved|walked|ran|came|traveled] [to|into|back to]",
            "[entered|reached]",
            "is now in",
            "arrived in",
            "followed a noise to",
        ),
        "validation": ("rushed to", "wandered to", "stepped into", "tramped over to", "has journeyed to"),
        "test": ("crept to", "proceeded to", "jogged to", "marched into", "strode back to", "has travelled to"),
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
"""By bAbI's own verbs; of [a|b|c] one is drawn."""

_CHOICE = re.compile(r"\[([^\]]*)\]")


def chosen(template: str, random: Random) -> str:
    """A template with one word for every [a|b|c]."""
    return _CHOICE.sub(lambda match: random.choice(match[1].split("|")), template)


def reworded(text: str, split: Split, random: Random) -> str:
    """A fact in other words of a part; a fact without such a verb as it is."""
    for verbs, others in MORE.items():
        match = re.fullmatch(rf"(\w+) (?:{'|'.join(sorted(verbs, key=len, reverse=True))}) (the .*)", text)
        if match:
            return f"{match[1]} {chosen(random.choice(others[split]), random)} {match[2]}"
    return text
