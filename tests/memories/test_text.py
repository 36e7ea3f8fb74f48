"""Texts tokenised a window at a time: the tokens are those of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.texts import sentences
from vllm_armt.memories.text import tokenize

CORPUS = sentences(Random(0), 200) + "\n\n  Ärger, naïve 😀 12345 漢字  \n" * 20


def trained(pre_tokenizer: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A small BPE with a BOS before every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", **options))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256) if options.get("byte_fallback"))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(pre_tokenizer) else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False, limit_alphabet=60
    )
    bpe.train_from_iterator([CORPUS], trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


SPLIT = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)| ?\p{L}+|\s+"), "isolated")
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "as Llama 3's": lambda: trained(
        pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    # one word as long as the text, with a space put before it
    "as Llama 2's": lambda: unsplit(trained(pre_tokenizers.Metaspace(), byte_fallback=True, fuse_unk=True)),
}


def unsplit(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Trained on words, and used on a whole text as on one word, with a space put before it."""
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


# runs of one character that are longer than the overlap may be cut otherwise
PIECES = ["the ", "house", " the", "\n\n", " .  \n", "é", "😀", "12345", "漢字", ". ", "<s>", "'s"]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=60),
    parts=st.integers(1, 40),
)
@example(pieces=[" ", "house "] * 40, parts=7)
@example(pieces=["house"] * 80, parts=1)
@settings(deadline=None, max_examples=150)
def test_windows_give_the_tokens_of_the_whole_text(tokenizer, pieces: list[str], parts: int) -> None:
    text = "".join(pieces)
    cut = [text[i : i + parts] for i in range(0, len(text), parts)]
    found = list(chain.from_iterable(tokenize(tokenizer, cut, window=60, context=40)))
    assert found == whole(tokenizer, text)


def test_a_long_text_is_the_same_and_no_window_is_longer_than_it_may_be(tokenizer, monkeypatch) -> None:
    text = " ".join(CORPUS[i:] for i in range(0, 400, 13))
    expected, seen = whole(tokenizer, text), []
    real = type(tokenizer).__call__

    def call(self: Any, text: str, **options: Any) -> Any:
        seen.append(len(text))
        return real(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    parts = (text[i : i + 500] for i in range(0, len(text), 500))
    found = list(chain.from_iterable(tokenize(tokenizer, parts, window=4000, context=200)))
    assert found == expected
    assert len(seen) > 20
    assert max(seen) <= 4000 + 2 * 200 + 500


def test_what_goes_on_has_no_beginning_of_its_own(tokenizer) -> None:
    ids = list(chain.from_iterable(tokenize(tokenizer, ["the house"], add_special_tokens=False)))
    assert [1, *ids] == whole(tokenizer, "the house")


def test_an_empty_text_has_no_tokens_but_those_before_it(tokenizer) -> None:
    assert list(chain.from_iterable(tokenize(tokenizer, []))) == [1]
    assert list(chain.from_iterable(tokenize(tokenizer, ["", ""], add_special_tokens=False))) == []
