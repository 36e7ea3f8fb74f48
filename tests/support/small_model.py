"""The small model that engines and servers are tested with, and what the readable reference says of a text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.golden_cases import Golden

GOLDEN = Golden("armt_hf_llama")
S = 16
VOCAB = 192


def random_prompt(length: int, seed: int = 0) -> list[int]:
    # without the two special tokens that the served tokenizer has
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [random_prompt(length, seed=i) for i, length in enumerate(lengths)]


@torch.no_grad()
def log_probs(reference: PreTrainedModel, tokens: list[int]) -> Tensor:
    """`[T - 1, V]`: what the reference predicts after each token but the last."""
    return reference(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
