"""Texts of any length as token ids, a piece at a time, where they come from: a string or a file on disk.

A text is cut where no token crosses: between a letter and a blank before a letter, else behind a line end. Each piece
is tokenised behind the last word of the piece before, so that what a tokenizer puts before a text stands there alone.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

from vllm_armt.memories.errors import InvalidInput

PIECE_CHARACTERS = 1 << 18
_BEFORE_A_WORD = re.compile(r".*[^\W\d_](?= [^\W\d_])", re.DOTALL)
_BEHIND_A_LINE = re.compile(r".*\n(?=\S)", re.DOTALL)
_LAST_WORD = re.compile(r"\w+$")

Encode = Callable[[str], list[int]]


class Tokens(Iterable[Sequence[int]], Protocol):
    """A text as ids, in parts; `total` is their number, as far as is known."""

    total: int


class TokenIds(list[list[int]]):
    """Ids that are at hand."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__([ids])
        self.total = len(ids)


class TextTokens:
    """The ids of a text, made as they are wanted; iterated again, made again.

    Args:
        encode: of a text, without special tokens.
        chunks: gives the text in parts of any length, from the beginning at every call.
        size: of the text, in the unit of `size_of`.
        size_of: of a part.
        begin: ids that stand before the text.

    Attributes:
        total: number of ids; of a text longer than a piece, as many as its first piece lets expect.
    """

    def __init__(
        self,
        encode: Encode,
        chunks: Callable[[], Iterable[str]],
        size: int,
        size_of: Callable[[str], int] = len,
        begin: Sequence[int] = (),
    ) -> None:
        self._encode, self._chunks, self._begin = encode, chunks, list(begin)
        first = next(pieces(chunks()), "")
        self.total = len(self._begin) + round(len(encode(first)) * size / max(size_of(first), 1))

    def __iter__(self) -> Iterator[list[int]]:
        if self._begin:
            yield self._begin
        before = ""
        for piece in pieces(self._chunks()):
            yield self._behind(before, piece)
            word = _LAST_WORD.search(piece[-64:])
            before = word[0] if word else ""

    def _behind(self, before: str, piece: str) -> list[int]:
        if before:
            known, ids = self._encode(before), self._encode(before + piece)
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return self._encode(piece)


def text_tokens(encode: Encode, text: str, begin: Sequence[int] = ()) -> TextTokens:
    """Of a string."""
    size = len(text)
    return TextTokens(
        encode,
        lambda: (text[i : i + PIECE_CHARACTERS] for i in range(0, size, PIECE_CHARACTERS)),
        size,
        begin=begin,
    )


def file_tokens(encode: Encode, file: BinaryIO, begin: Sequence[int] = ()) -> TextTokens:
    """Of a file, which is read from its beginning at every iteration. Reads it once, to know that it is a text.

    Raises:
        InvalidInput: it is empty, or not UTF-8.
    """
    bytes_read = 0
    try:
        for chunk in _decoded(file):
            bytes_read += len(chunk.encode())
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"The file is no text in UTF-8: {error.reason} at byte {bytes_read + error.start} or soon behind it."
        ) from None
    if not bytes_read:
        raise InvalidInput("The file is empty; give at least one character.")
    return TextTokens(encode, lambda: _decoded(file), bytes_read, lambda text: len(text.encode()), begin)


def _decoded(file: BinaryIO) -> Iterator[str]:
    # a byte order mark is no text
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    file.seek(0)
    while data := file.read(PIECE_CHARACTERS):
        if text := decoder.decode(data):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text, cut where no token is expected to cross."""
    waiting = ""
    for chunk in chunks:
        waiting += chunk
        if len(waiting) >= PIECE_CHARACTERS:
            cut = _BEFORE_A_WORD.match(waiting) or _BEHIND_A_LINE.match(waiting)
            end = cut.end() if cut else len(waiting)
            yield waiting[:end]
            waiting = waiting[end:]
    if waiting:
        yield waiting


def leading_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: the token that begins a sequence, or nothing."""
    with suppress(IndexError):
        if (first := tokenizer.encode("a")[0]) == tokenizer.bos_token_id:
            return [first]
    return []
