"""The served model's tokenizer and flags, and what is read out of its answers and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.small_model import VOCAB, log_probs, random_prompt

MODEL = "tiny-armt"
PAGES = 12
STEP_TOKENS = 64
TOLERANCE = 1e-3
"""Relative L2 error of log-probabilities. The reference's own in float32 is 2e-5 for the texts here, and up to 1e-2 for
unlucky ones: random weights amplify rounding from segment to segment."""

# few tokens a step, so that a prompt takes many; few pages, so that requests preempt each other
FLAGS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-num-batched-tokens", str(STEP_TOKENS)),
    *("--max-num-seqs", "8"),
    *("--num-gpu-blocks-override", str(PAGES)),
    *("--max-logprobs", "-1"),
    *("--kv-cache-memory-bytes", str(1 << 26)),
)

# every token has a text of its own, so that a text tells its tokens
CHARACTERS = ["<unk>", "<eos>", "\n", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xAE, 0xAE + VOCAB - 98))]

# with tools and calls as Hermes' models have them; a line end behind a block would be left out
CHAT_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or () %}"
    '<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def add_tokenizer(directory: Path) -> None:
    """Write a tokenizer of one token per character, and a chat template."""
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(CHARACTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def rendered(messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that the chat template makes of `messages` without tools."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


def random_text(length: int, seed: int = 0) -> str:
    return "".join(CHARACTERS[token] for token in random_prompt(length, seed))


def is_greedy(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each of `tokens` is the model's most likely one, or as likely as it up to rounding."""
    expected = log_probs(model, prompt + tokens)[len(prompt) - 1 :]
    chosen = expected.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    return bool((chosen >= expected.max(dim=-1).values - 0.05).all())


def served_log_probs(top_logprobs: Sequence[Mapping[str, float]]) -> Tensor:
    """`[positions, V]` of a completion that was asked for all log-probabilities by token id."""
    return torch.tensor([[position[f"token_id:{token}"] for token in range(VOCAB)] for position in top_logprobs])


def metric(http: httpx.Client, name: str) -> float:
    """The value of one of vLLM's metrics, by its sample name.

    Raises:
        KeyError: the server does not report it.
    """
    families = text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
    values = [sample.value for family in families for sample in family.samples if sample.name == f"vllm:{name}"]
    if not values:
        raise KeyError(name)
    return sum(values)


def requests_open(http: httpx.Client) -> float:
    """Requests that run or wait."""
    return metric(http, "num_requests_running") + metric(http, "num_requests_waiting")


def pages_held(http: httpx.Client) -> float:
    """Pages that requests hold."""
    return metric(http, "kv_cache_usage_perc") * (PAGES - 1)


def options(**given: Any) -> dict[str, Any]:
    """Options of vLLM's that the OpenAI client knows nothing of: generation does not end by itself."""
    return {"ignore_eos": True} | given
