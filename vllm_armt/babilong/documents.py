"""Facts hidden in a background, at chosen depths and to the token as long as asked for (BABILong, arXiv 2406.10149)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from vllm_armt.babilong.background import Background, Tokens


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        ids: its tokens, int32.
        starts: where each piece begins, in tokens.
    """

    ids: Tokens
    starts: list[int]


@dataclass(frozen=True)
class Cut:
    """The wish that a segment boundary runs through a piece.

    Attributes:
        piece: which.
        segment_size: S, tokens between boundaries.
        at: tokens of the piece before the boundary; None for any number.
    """

    piece: int
    segment_size: int
    at: int | None = None


def weave(
    pieces: Sequence[Sequence[int]],
    depths: Sequence[float],
    length: int,
    background: Background,
    random: Random,
    cuts: Sequence[Cut] = (),
    strewn: Sequence[tuple[float, Sequence[int]]] = (),
) -> Document:
    """Hide pieces in an excerpt of a background, in their order, each where a sentence of it ends.

    A piece goes to the sentence end nearest to its depth. The excerpt ends with a sentence, and begins where it must
    for the document to be `length` tokens long; with cuts it lies so that a sentence ends where the first needs it, and
    the others interrupt whatever stands there.

    Args:
        pieces: tokens of each.
        depths: ascending, where each goes, as shares of the background: 0 before and 1 behind all of it.
        length: tokens of the document.
        background: what they are hidden in.
        random: for where the excerpt lies, and where cuts run.
        cuts: of pieces, or of what is strewn, which counts on behind the pieces; each is made if the document is long
            enough for it and none before it took its boundary.
        strewn: depths below 1 and tokens of further pieces, in any order, which go between the others.

    Returns:
        The document, with the starts of `pieces` alone.

    Raises:
        ValueError: the pieces alone are longer.
    """
    every = [*zip(depths, pieces, strict=True), *strewn]
    # a stable order: what opens a document stays before what is strewn
    order = sorted(range(len(every)), key=lambda i: every[i][0])
    place = {piece: i for i, piece in enumerate(order)}
    depths, pieces = [every[i][0] for i in order], [every[i][1] for i in order]
    sizes = [len(piece) for piece in pieces]
    before = np.cumsum([0, *sizes]).tolist()
    room = length - before[-1]
    if room < 0:
        raise ValueError(f"{length:,} tokens were asked for, but facts and question alone take {before[-1]:,}.")
    gaps: list[int | None] = [None] * len(pieces)
    start = int(random.choice(background.ends)) - room
    taken: set[int] = set()
    for cut in cuts:
        i = place[cut.piece]
        boundary = _boundary(cut.segment_size, before[i], sizes[i], depths[i], room)
        places = _places(cut.at, boundary - before[i], sizes[i], room)
        if boundary in taken or not places:
            continue
        gap = gaps[i] = random.choice(places)
        if not taken:
            start = int(random.choice(background.ends)) - gap
        taken.add(boundary)
    parts, starts, done = [], [], 0
    excerpt = background.excerpt(start, room)
    # a piece never passes the next one that is cut
    limits = np.minimum.accumulate([room if gap is None else gap for gap in reversed(gaps)])[::-1].tolist()
    for piece, size, depth, wished, limit in zip(pieces, before, depths, gaps, limits, strict=False):
        if wished is None:
            wished = round(depth * room)
            if 0 < depth < 1:
                wished = background.nearest_end(start + wished) - start
        gap = max(done, min(wished, limit))
        parts += [excerpt[done:gap], np.asarray(piece, dtype=np.int32)]
        starts.append(gap + size)
        done = gap
    parts.append(excerpt[done:])
    return Document(np.concatenate(parts), [starts[place[i]] for i in range(len(every) - len(strewn))])


def _boundary(S: int, before: int, size: int, depth: float, room: int) -> int:
    """The boundary nearest to a piece's depth."""
    first, last = before // S + 1, (before + room + size - 1) // S
    return min(max(first, round((before + depth * room) / S)), last) * S


def _places(at: int | None, boundary: int, size: int, room: int) -> list[int]:
    """How much of the background may lie before a piece that a boundary is to run through, after `at` of its tokens.

    `boundary` is counted without the pieces before this one.
    """
    begun = range(size - 1, 0, -1) if at is None else (at,)
    return [boundary - tokens for tokens in begun if 0 <= boundary - tokens <= room]
