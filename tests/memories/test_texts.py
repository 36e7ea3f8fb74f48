"""Texts as token ids, in pieces: as if they had been tokenised whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_armt.memories import texts
from vllm_armt.memories.errors import InvalidInput
from vllm_armt.memories.texts import TextTokens, file_tokens, leading_ids, pieces, text_tokens

ROOT = Path(__file__).parents[2]
WRITTEN = """# A title

"Quoted," said Mary: she went to the garden, and 42 apples lay there at 8:30.

* a list of things, one a line
* `code` and a [link](https://example.org/a-long/address_of.html?with=numbers&and=1234567890)

| a table | of words |
|---|---|
| first row | holds 1,000 and 2.5 |

    def indented(code: str) -> int:
        return len(code)  # and a comment of several words
"""
TEXT = WRITTEN + "\n\n" + (ROOT / "LICENSE").read_text() + "\n" + WRITTEN


def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ROOT / "examples/models/ARMT-1M-qa1")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank is put before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [shipped, byte_level, metaspace])
@pytest.mark.parametrize("size", [211, 4_000])
def test_pieces_have_the_tokens_of_the_whole(make, size, monkeypatch):
    tokenizer = make()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    monkeypatch.setattr(texts, "PIECE_CHARACTERS", size)
    tokens = text_tokens(encode, TEXT)
    assert len(list(tokens)) > len(TEXT) // size // 2
    # a second time, as when it has to be read again
    for _ in range(2):
        assert [id for ids in tokens for id in ids] == encode(TEXT)
    assert tokens.total == pytest.approx(len(encode(TEXT)), rel=0.5)


def test_a_text_of_one_piece_says_its_length_exactly():
    tokens = TextTokens(list, lambda: ["abcd"], 4, begin=[1])  # type: ignore[arg-type]
    assert tokens.total == 5
    assert list(tokens) == [[1], list("abcd")]


def test_pieces_are_cut_before_a_word_or_behind_a_line_or_anywhere(monkeypatch):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 8)
    for text, cut in (("ab cd e1", "ab cd"), ("12\n34567", "12\n"), ("12345678", "12345678")):
        assert next(pieces([text])) == cut
        assert "".join(pieces([text])) == text


def test_a_file_is_read_without_its_byte_order_mark_and_over_cut_characters(monkeypatch):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 3)
    text = "äöü – 記憶, over cut characters"
    tokens = file_tokens(lambda part: list(part.encode()), io.BytesIO(b"\xef\xbb\xbf" + text.encode()))
    assert bytes(id for ids in tokens for id in ids).decode() == text


@pytest.mark.parametrize("data", [b"text \xff\xfe", b"cut \xc3", "sixteen".encode("utf-16")])
def test_a_file_that_is_no_text_is_refused(data):
    with pytest.raises(InvalidInput, match="UTF-8"):
        file_tokens(lambda part: [0], io.BytesIO(data))


def test_an_empty_file_is_refused():
    with pytest.raises(InvalidInput, match="empty"):
        file_tokens(lambda part: [0], io.BytesIO(b""))


def test_what_a_tokenizer_puts_before_a_text_is_known():
    class WithStart:
        bos_token_id = 1

        def encode(self, text):
            return [1, 5, 2]

    class Without:
        bos_token_id = None

        def encode(self, text):
            return [5]

    assert leading_ids(WithStart()) == [1]
    assert leading_ids(Without()) == []
