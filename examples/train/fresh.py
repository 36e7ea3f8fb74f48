"""A small model made from nothing: its tokenizer, and a Llama with fresh memories."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.train.recipe import Fresh
from examples.train.transplant import share_vectors, take_over
from vllm_armt.babilong import TASKS, UNKNOWN, story
from vllm_armt.babilong.stories import NAMES
from vllm_armt.hf import ARMTForCausalLM

END = "<|end|>"
WORDS = r"\w+ ?|[^\w\s]+ ?|\n|[^\S\n]+"
"""Pieces of text that no token passes, where spaces trail."""
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
MOST_FACTS = 40
STORIES = 1200
"""Of each task, for the tokenizer: enough for every word of them to become one token."""


def make_fresh(fresh: Fresh, directory: Path, segment_size: int, background: Path | None, seed: int) -> Path:
    """Return `directory` with a model in it; one that is there already is left as it is."""
    if directory.exists():
        return directory
    scratch = directory.with_name(f".{directory.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer = train_tokenizer(fresh.vocab_size, background, trailing=fresh.spaces == "trailing")
    tokenizer.save_pretrained(scratch)
    model = make_model(fresh, tokenizer, segment_size, seed)
    if fresh.like is not None:
        take_over(model, tokenizer, fresh.like)
    model.save_pretrained(scratch)
    scratch.rename(directory)
    return directory


def train_tokenizer(vocab_size: int, background: Path | None, trailing: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text that the model will read: books, and stories of the training part.

    With `trailing` spaces belong to the word before them, every line end is a token, and there is a chat template, in
    which each message is a line or more.
    """
    bpe = byte_level(trailing)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    bpe.train_from_iterator(_texts(background, trailing), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    if trailing:
        tokenizer.chat_template = CHAT
    return tokenizer


def byte_level(trailing: bool) -> Tokenizer:
    """A BPE that has not been trained."""
    bpe = Tokenizer(models.BPE())
    if trailing:
        split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def make_model(fresh: Fresh, tokenizer: PreTrainedTokenizerFast, segment_size: int, seed: int) -> ARMTForCausalLM:
    """An untrained ARMT of a Llama, in float32."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=fresh.hidden_size,
            intermediate_size=fresh.intermediate_size,
            num_hidden_layers=fresh.layers,
            num_attention_heads=fresh.heads,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    ).float()
    draw(base, fresh)
    if fresh.spaces == "trailing":
        share_vectors(base.get_input_embeddings(), tokenizer)
    model = ARMTForCausalLM.from_base(
        base,
        segment_size,
        fresh.num_mem_tokens,
        d_mem=fresh.d_mem,
        variant=fresh.variant,
        wrap_layers=None if fresh.memory else [False] * fresh.layers,
    )
    gain = fresh.memory_gain * fresh.hidden_size**-0.5
    for name, module in model.named_modules():
        if name.endswith("W_mq"):
            nn.init.normal_(module.weight, std=gain)
        elif name.endswith("W_mk"):
            nn.init.normal_(module.weight, std=gain)
            if fresh.tie_queries:
                module.weight.data.copy_(model.get_submodule(name.removesuffix("W_mk") + "W_mq").weight)
    return model


def draw(base: LlamaForCausalLM, fresh: Fresh) -> None:
    """Draw a Llama's weights at the scales of the recipe."""
    nn.init.normal_(base.get_input_embeddings().weight, std=fresh.embedding_std)
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear):
            gain = fresh.residual_gain if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
        if fresh.tie_queries and name.endswith("k_proj"):
            # named after q_proj, which has been drawn
            query = base.model.get_submodule(name.removesuffix("k_proj") + "q_proj")
            module.weight.data.copy_(query.weight)


def _texts(background: Path | None, trailing: bool) -> Iterator[str]:
    if background is not None:
        for file in sorted((background / "train").glob("*.txt")):
            text = file.read_text()
            yield text if trailing else " " + " ".join(text.split())
    for task in TASKS.values():
        for i in range(STORIES):
            one = story(task, "train", 0, i, None if task.facts[1] <= MOST_FACTS else MOST_FACTS)
            sentences = [*(fact.text for fact in one.facts), one.question.text, one.question.answer]
            yield " ".join(sentences) if trailing else "".join(f" {sentence}" for sentence in sentences)
    # words of answers and names, as they stand at the end of a line
    for word in sorted(NAMES | {UNKNOWN}) if trailing else ():
        yield "\n".join([word, f"{word} {word}"] * STORIES)
