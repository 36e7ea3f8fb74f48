"""What a new vocabulary begins with: vectors that words share, and those of a model that was trained with another."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_armt.hf import RecurrentForCausalLM

SHARED = 0.9
"""Of the variance of a token's vector, what it shares with the one of the same word with a space."""


def share_vectors(embedding: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Draw the vectors of tokens that differ by a space alone near each other: "Mary", and "Mary " before a verb."""
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    known = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    with torch.no_grad():
        for word, i in known.items():
            bare = known.get(word.rstrip(" "))
            if bare is not None and bare != i:
                weight[i] = math.sqrt(SHARED) * weight[bare] + math.sqrt(1 - SHARED) * weight[i]


def take_over(model: RecurrentForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Give a model the weights of another one of the same sizes that has other tokens.

    A token's vector is the mean of those by which the other tokenizer writes the same word behind a space.

    Raises:
        ValueError: the sizes differ.
    """
    words = AutoTokenizer.from_pretrained(directory)
    other: RecurrentForCausalLM = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours, theirs = model.state_dict(), other.state_dict()
    vectors = other.get_input_embeddings().weight.detach()
    tables = {name for name, tensor in theirs.items() if tensor.shape == vectors.shape}
    differing = [name for name in ours if name not in tables and ours[name].shape != theirs[name].shape]
    if differing:
        raise ValueError(f"{directory} has other sizes than the recipe's `fresh`, as of {differing[0]}.")
    rows = []
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        spaced = f" {text.strip()}" if text.strip() and text[0].isalnum() else text.rstrip(" ") or text
        ids = words(spaced, add_special_tokens=False).input_ids or [words.eos_token_id]
        rows.append(vectors[ids].mean(0))
    rows[tokenizer.eos_token_id] = vectors[words.eos_token_id]
    for name in ours:
        ours[name].copy_(torch.stack(rows) if name in tables else theirs[name])
