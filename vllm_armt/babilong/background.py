"""The text that facts are hidden in, as the tokens of one tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.encoder import Encoder
from vllm_armt.babilong.stories import NAMES

Tokens = NDArray[np.int32]

Whitespace = Literal["as-is", "collapsed"]
WHITESPACE: tuple[Whitespace, ...] = get_args(Whitespace)

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)|(?<=\S)(?=[ \t]*\n[ \t]*\n)")
"""Of a sentence, or of a paragraph that ends without one: a heading, a list, code."""


class Background:
    """A text without an end: after its last token comes its first.

    Attributes:
        ids: its tokens.
        ends: ascending, how many tokens lie before the end of each sentence.
        mentions: sentences that hold a name that stories use, as `[first, beyond]` rows of tokens.
    """

    def __init__(self, ids: Tokens, ends: NDArray[np.int64], mentions: NDArray[np.int64]) -> None:
        self.ids = ids
        self.ends = ends
        self.mentions = mentions

    @classmethod
    def of_texts(
        cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, whitespace: Whitespace = "as-is"
    ) -> Background:
        """The texts, one behind another; as they are, or with single spaces for all that parts words.

        Raises:
            ValueError: they hold no sentence, or the tokenizer cannot say which token stands for which characters.
        """
        if not tokenizer.is_fast:
            raise ValueError("Facts are hidden between sentences, which needs a fast tokenizer (a tokenizer.json).")
        ids, ends, mentions, length = [], [], [], 0
        trails = Encoder(tokenizer).trails
        for text in texts:
            text = _with(whitespace, text, trails)
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids.append(np.array(encoding.input_ids, dtype=np.int32))
            beyond = np.array([offsets[1] for offsets in encoding.offset_mapping])
            stops = np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)
            if trails:
                # a sentence ends with the space behind it, and its token with it
                stops = np.minimum(stops + 1, len(text))
            tokens = np.searchsorted(beyond, stops, side="right")
            # a sentence whose end lies inside a token is joined with the next one
            whole = (tokens > 0) & (beyond[tokens - 1] == stops)
            begin, start = 0, length
            for stop, end in zip(stops[whole], tokens[whole] + length, strict=True):
                ends.append(end)
                if not NAMES.isdisjoint(_words(text[begin:stop])):
                    mentions.append((start, end))
                begin, start = stop, end
            length += len(encoding.input_ids)
        if not ends:
            raise ValueError("The background text holds no sentence.")
        return cls(
            np.concatenate(ids), np.array(ends, dtype=np.int64), np.array(mentions, dtype=np.int64).reshape(-1, 2)
        )

    @classmethod
    def of_directory(
        cls, directory: Path, tokenizer: PreTrainedTokenizerBase, whitespace: Whitespace = "as-is"
    ) -> Background:
        """The `.txt` files of a directory, in the order of their names.

        Raises:
            ValueError: there are none.
        """
        files = sorted(directory.glob("*.txt"))
        if not files:
            raise ValueError(
                f"{directory} holds no .txt files to hide facts in. Fetch some books with `python -m "
                "examples.background`, or name a directory with text of your own."
            )
        return cls.of_texts((file.read_text() for file in files), tokenizer, whitespace)

    @cached_property
    def digest(self) -> str:
        """By which the text, in this tokenizer's tokens, is known again."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]

    def excerpt(self, start: int, length: int) -> Tokens:
        """`length` tokens from `start` on, however many."""
        start %= len(self.ids)
        if start + length <= len(self.ids):
            return self.ids[start : start + length]
        return np.resize(np.roll(self.ids, -start), length)

    def nearest_end(self, token: int) -> int:
        """The end of a sentence nearest to `token`, counted on where the text begins anew."""
        rounds, token = divmod(token, len(self.ids))
        i = int(np.searchsorted(self.ends, token))
        below = self.ends[i - 1] if i else self.ends[-1] - len(self.ids)
        above = self.ends[i] if i < len(self.ends) else self.ends[0] + len(self.ids)
        return int(below if token - below <= above - token else above) + rounds * len(self.ids)


def _with(whitespace: Whitespace, text: str, trails: bool) -> str:
    if whitespace == "as-is":
        return text if text.endswith("\n") else text + "\n"
    words = " ".join(text.split())
    return words + " " if trails else " " + words


def _words(text: str) -> set[str]:
    # a symbol of the associative tasks is no name: "a" is in every text
    return {word for word in re.findall(r"\w+", text) if len(word) > 1}
