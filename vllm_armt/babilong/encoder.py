"""Tokens of sentences as they stand between other sentences, whichever side of a word a tokenizer puts its space on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.forms import INLINE, Form


class Encoded(NamedTuple):
    """A piece of text.

    Attributes:
        ids: its tokens.
        text: what they are of, spaces around it included.
        begin: characters of it before the sentence itself.
        context: what stands before it, where that counts for its tokens.
        joined: whether no space parts it from what stands before.
    """

    ids: list[int]
    text: str
    begin: int = 0
    context: str = ""
    joined: bool = False


class Encoder:
    """Encodes sentences.

    Attributes:
        tokenizer: of the model.
        trails: whether a space belongs to the word before it. Most tokenizers put it with the word behind, and then a
            sentence begins with the space that parts it from the one before; with this one it ends with one.
    """

    _BEFORE = "."

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        self.places: dict[tuple[str, int], int] = {}
        whole = self._tokens(". A")
        leads = whole[:1] == self._tokens(".")
        self.trails = not leads and whole == self._tokens(". ") + self._tokens("A")

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that follows another sentence; with a tokenizer whose spaces trail, that one's space too.

        Raises:
            ValueError: the tokenizer would join it with what stands before.
        """
        if text not in self.known:
            if self.trails:
                self.known[text] = self._tokens(text)
            else:
                before = self._tokens(self._BEFORE)
                tokens = self._tokens(self._BEFORE + text)
                if tokens[: len(before)] != before:
                    raise ValueError(
                        f"The tokenizer joins {text!r} with the full stop before it, so it cannot be placed."
                    )
                self.known[text] = tokens[len(before) :]
        return self.known[text]

    def opening(self, text: str) -> Encoded:
        """A text that begins a document."""
        return Encoded(self._tokens(text) if text else [], text)

    def closing(self, text: str) -> Encoded:
        """A text that ends a document."""
        return Encoded(self(text), text)

    def sentence(self, text: str, form: Form = INLINE, *, opens: bool = False, asks: bool = False) -> Encoded:
        """A sentence in a form, with the space that parts it from its neighbours.

        Args:
            text: the sentence.
            form: in which it stands.
            opens: whether it begins a text: then nothing stands before it but what opens its form.
            asks: whether it is a question: then nothing stands behind it but what closes its form.
        """
        opened, closed = form.before, form.after
        if opens:
            opened = opened.lstrip()
        elif not (self.trails or form.joined or opened[:1] == "\n"):
            opened = " " + opened
        if self.trails and not (asks or form.joined or closed[-1:] == "\n"):
            closed += " "
        whole = opened + text + closed
        alone = opens or self.trails
        ids = self._tokens(whole) if alone else self(whole)
        return Encoded(ids, whole, len(opened), "" if alone else self._BEFORE, form.joined)

    def within(self, piece: Encoded, character: int) -> int:
        """The token of a piece that holds a character of its sentence, counted from the sentence's first."""
        at = piece.begin + character
        if (piece.text, at) not in self.places:
            self.places[piece.text, at] = self._place(piece, at)
        return self.places[piece.text, at]

    def together(self, pieces: Sequence[Encoded]) -> tuple[list[int], list[int]]:
        """Tokens of a text of these pieces alone, as somebody would type it, and where each piece begins in them.

        Where two meet, the space or the line ends that close the one give way to those that open the other.
        """
        text, begins = "", []
        for piece in pieces:
            if piece.joined or piece.text[:1] == "\n":
                text = text.rstrip(" \n") if piece.text[:1] == "\n" else text.rstrip(" ")
            begins.append(len(text))
            # nor does a line begin with the space that parts sentences
            text += piece.text[1:] if text.endswith("\n") and piece.text[:1] == " " else piece.text
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in encoding.offset_mapping])
        return encoding.input_ids, np.searchsorted(ends, begins, side="right").tolist()

    def _place(self, piece: Encoded, at: int) -> int:
        encoding = self.tokenizer(piece.context + piece.text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoding.offset_mapping[len(encoding.input_ids) - len(piece.ids) :]
        return next(i for i, (_, end) in enumerate(offsets) if end > at + len(piece.context))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids
