"""How a step's tokens are shared out to documents: turns of a segment each, in chunks that end where one does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain

from vllm.utils.math_utils import round_down, round_up

from vllm_armt.core import Segmentation


def legal_limits(
    segment_size: int, max_num_seqs: int, max_num_batched_tokens: int, long_prefill_token_threshold: int
) -> tuple[int, int]:
    """The two scheduler limits, raised to the nearest at which every step has room for a segment.

    A step has to fit one token of every decode and a segment besides; a threshold on prefill chunks has
    to be whole segments.

    Returns:
        `max_num_batched_tokens` and `long_prefill_token_threshold` (0 means none and stays 0).
    """
    return (
        max(max_num_batched_tokens, segment_size + max_num_seqs),
        round_up(long_prefill_token_threshold, segment_size),
    )


def round_robin(budget: int, needs: dict[str, int], segment_size: int) -> dict[str, int]:
    """Give `budget` tokens out to documents, a segment a turn, in the order of `needs`.

    Args:
        budget: tokens that the step has for documents.
        needs: tokens that each document has left to read.
        segment_size: S.

    Returns:
        Tokens for each document: whole segments, or all that it has left.
    """
    granted = dict.fromkeys(needs, 0)
    turns = deque(needs)
    while turns:
        document = turns.popleft()
        piece = min(segment_size, needs[document] - granted[document])
        if piece <= budget:
            granted[document] += piece
            budget -= piece
            if granted[document] < needs[document]:
                turns.append(document)
    return granted


def chunk_length(start: int, end: int, text_end: int, segmentation: Segmentation, page_tokens: int) -> int:
    """How many of the tokens `[start, end)` of a text of `text_end` tokens make a legal chunk.

    A chunk ends with the text or with a segment; in one that never closes, with one of its pages of
    `page_tokens` tokens. A chunk that starts inside a segment stays in it: that segment's page is in use
    already, so it has to be written, and only a chunk's last pages are. So does a chunk whose segment is
    shorter than `page_tokens`: the wave takes whole ones only, and the next needs the memory after it.
    """
    beyond = segmentation.end(start)
    if beyond is not None and beyond - start < page_tokens:
        end = min(end, beyond)
    if end < text_end:
        begin = segmentation.begin(segmentation.segment(end))
        end = begin + round_down(end - begin, page_tokens)
    return max(end - start, 0)


@dataclass
class Shares:
    """The tokens that documents may read in one step.

    Attributes:
        segment_size: S.
        granted: tokens of each document; new ones are given theirs when they start, out of what is `left`.
        left: tokens for new documents, all together.
        newcomers: new documents that are still to come.
    """

    segment_size: int
    granted: dict[str, int]
    left: int = 0
    newcomers: int = 0

    def for_newcomer(self) -> int:
        """Tokens for the next new document: an even share, and at least a segment, of what is left for all.

        How much a new document needs shows only when it starts, once the prefix cache has been asked; what it does
        not use goes to the next.
        """
        share = round_down(self.left // max(self.newcomers, 1), self.segment_size)
        self.newcomers -= 1
        return min(self.left, max(share, self.segment_size))

    def take(self, tokens: int) -> None:
        """A new document starts with so many tokens; if there are none for it, there are none for those behind it.

        A shorter text would take the slot that it waits for.
        """
        self.left = self.left - tokens if tokens else 0


class Turns:
    """Who reads next, from step to step.

    Turns go round: a document that is granted nothing keeps its place, the others go to the back, where new documents
    join. So a document waits for as many others as there are, however long they are.

    Args:
        segment_size: S.
    """

    def __init__(self, segment_size: int) -> None:
        self._segment_size = segment_size
        self._order: list[str] = []

    def share(self, budget: int, running: dict[str, int], newcomers: dict[str, int]) -> Shares:
        """Share out a step.

        Args:
            budget: tokens that the step has for documents.
            running: tokens that each document could read.
            newcomers: the same of those that have not begun.
        """
        needs = running | newcomers
        turns = dict.fromkeys(chain((document for document in self._order if document in needs), needs))
        granted = round_robin(budget, {document: needs[document] for document in turns}, self._segment_size)
        self._order = sorted(turns, key=lambda document: granted[document] > 0)
        left = budget - sum(granted[document] for document in running)
        return Shares(self._segment_size, granted, left, len(newcomers))
