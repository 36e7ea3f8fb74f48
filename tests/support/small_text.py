"""A small tokenizer and a small text."""

from __future__ import annotations

from random import Random

import pytest
from tokenizers import pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.train.fresh import CHAT, byte_level
from tests.support.texts import sentences
from vllm_armt.babilong import TASKS, Background, story


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained(trailing=False)


@pytest.fixture(scope="session")
def trailing() -> PreTrainedTokenizerFast:
    """A tokenizer whose spaces belong to the word before them."""
    return trained(trailing=True)


def trained(trailing: bool) -> PreTrainedTokenizerFast:
    bpe = byte_level(trailing)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    stories = (story(task, "train", 0, i, min(10, task.facts[1])) for task in TASKS.values() for i in range(30))
    texts = [" ".join(fact.text for fact in one.facts) + f" {one.question.text}" for one in stories]
    bpe.train_from_iterator([sentences(Random(0), 200), *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def background(tokenizer) -> Background:
    return Background.of_texts([sentences(Random(i), 150) for i in range(3)], tokenizer)
