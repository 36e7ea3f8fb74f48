"""The tokens of a text of any length, as if it had been tokenised whole: a window at a time.

A window overlaps the next one, and the text is cut where both begin a token. What a tokenizer does with a place depends
on the text around it, but not on text that is far away: with `CONTEXT` characters before and behind the cut, both
windows agree there. (Of a run of one character that is longer than that, some tokenizers make other tokens in other
windows; the text that they stand for is the same.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1 << 18
"""Characters that are tokenised at a time."""
CONTEXT = 1 << 10
"""Characters that two windows see on each side of a cut."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    parts: Iterable[str],
    *,
    add_special_tokens: bool = True,
    window: int = WINDOW,
    context: int = CONTEXT,
) -> Iterator[list[int]]:
    """Token ids of a text, in lists of any length. Of the text only a window and a part are held at a time.

    Args:
        tokenizer: one that tells where its tokens lie in the text (`is_fast`); others are given the text whole.
        parts: of the text, in any lengths.
        add_special_tokens: begin with what the tokenizer puts before a text, a BOS for instance. What it would put
            behind the text is left out: a memory goes on.
        window: characters that are tokenised at a time.
        context: characters of the overlap on each side of a cut.
    """
    if not tokenizer.is_fast:
        ids = list(tokenizer("".join(parts), add_special_tokens=False, verbose=False).input_ids)
        yield (_before_text(tokenizer) if add_special_tokens else []) + ids
        return
    if add_special_tokens and (before := _before_text(tokenizer)):
        yield before
    # `begin`: where in `text` tokens are wanted from; what stands before it is context
    text, begin = "", 0
    for part in parts:
        text += part
        while len(text) - begin >= window + 2 * context:
            end = begin + window
            ids, begins = _tokens(tokenizer, text[: end + context])
            ahead = max(end - context, 0)
            _, others = _tokens(tokenizer, text[ahead : end + 2 * context])
            common = {ahead + place for place in others} & set(begins)
            # as far from both windows' edges as it gets; a text without such a place is cut where it has to be
            cut = min(common, key=lambda place: abs(place - end), default=end)
            yield [id for id, place in zip(ids, begins, strict=True) if begin <= place < cut]
            start = max(cut - context, 0)
            text, begin = text[start:], cut - start
    ids, begins = _tokens(tokenizer, text)
    yield [id for id, place in zip(ids, begins, strict=True) if place >= begin]


def _before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    whole = list(tokenizer("a").input_ids)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Ids, and where each begins in the text, in characters."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found.input_ids), [begin for begin, _ in found.offset_mapping]
