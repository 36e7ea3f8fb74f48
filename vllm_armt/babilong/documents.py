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
    """

    piece: int
    segment_size: int


def weave(
    pieces: Sequence[Sequence[int]],
    depths: Sequence[float],
    length: int,
    background: Background,
    random: Random,
    cut: Cut | None = None,
    strewn: Sequence[tuple[float, Sequence[int]]] = (),
) -> Document:
    """Hide pieces in an excerpt of a background, in their order, each where a sentence of it ends.

    A piece goes to the sentence end nearest to its depth. The excerpt ends with a sentence, and begins where it must
    for the document to be `length` tokens long; for a cut it lies so that a sentence ends where that needs it.

    Args:
        pieces: tokens of each.
        depths: ascending, where each goes, as shares of the background: 0 before and 1 behind all of it.
        length: tokens of the document.
        background: what they are hidden in.
        random: for where the excerpt lies, and where a cut runs.
        cut: kept if the document is long enough for it.
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
    cut = cut and Cut(place[cut.piece], cut.segment_size)
    sizes = [len(piece) for piece in pieces]
    before = np.cumsum([0, *sizes]).tolist()
    room = length - before[-1]
    if room < 0:
        raise ValueError(f"{length:,} tokens were asked for, but facts and question alone take {before[-1]:,}.")
    gaps: list[int | None] = [0 if depth == 0 else room if depth == 1 else None for depth in depths]
    start = int(random.choice(background.ends)) - room
    if cut and (places := _cuts(cut, before[cut.piece], sizes[cut.piece], depths[cut.piece], room)):
        gap = random.choice(places)
        gaps[cut.piece] = gap
        start = int(random.choice(background.ends)) - gap
    parts, starts, done = [], [], 0
    excerpt = background.excerpt(start, room)
    # a piece never passes the next one whose place is given
    limits = np.minimum.accumulate([room if gap is None else gap for gap in reversed(gaps)])[::-1].tolist()
    for piece, size, depth, given, limit in zip(pieces, before, depths, gaps, limits, strict=False):
        wished = background.nearest_end(start + round(depth * room)) - start if given is None else given
        gap = max(done, min(wished, limit))
        parts += [excerpt[done:gap], np.asarray(piece, dtype=np.int32)]
        starts.append(gap + size)
        done = gap
    parts.append(excerpt[done:])
    return Document(np.concatenate(parts), [starts[place[i]] for i in range(len(every) - len(strewn))])


def _cuts(cut: Cut, before: int, size: int, depth: float, room: int) -> list[int]:
    """Background tokens that may lie before a piece for the boundary nearest to its depth to run through it."""
    S = cut.segment_size
    first, last = before // S + 1, (before + room + size - 1) // S
    boundary = min(max(first, round((before + depth * room) / S)), last) * S
    return [gap for gap in range(boundary - size + 1 - before, boundary - before) if 0 <= gap <= room]
