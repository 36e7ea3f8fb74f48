"""A small tokenizer and a small text."""

from __future__ import annotations

from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.texts import sentences
from vllm_armt.babilong import TASKS, Background, story


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    stories = (story(task, "train", 0, i) for task in TASKS.values() for i in range(30))
    texts = [" ".join(fact.text for fact in one.facts) + f" {one.question.text}" for one in stories]
    bpe.train_from_iterator([sentences(Random(0), 200), *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.fixture(scope="session")
def background(tokenizer) -> Background:
    return Background.of_texts([sentences(Random(i), 150) for i in range(3)], tokenizer)
