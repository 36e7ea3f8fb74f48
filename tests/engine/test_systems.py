"""Every system through the engine: it computes what the readable model does, whatever the server does to requests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.engines import (
    decoded_log_probs,
    engine,
    generate,
    greedy,
    pages_in_use,
    prompt_log_probs,
    recorded_preemptions,
)
from tests.support.golden_cases import ALL, relative_l2
from tests.support.small_hf import KINDS, S, Small, text
from vllm_armt.config import BACKBONES
from vllm_armt.hf import MODELS, RecurrentForCausalLM

OPEN = [
    Small("armt", "llama", {"generation_policy": "open", "variant": "v1"}),
    Small("armt", "llama", {"generation_policy": "open", "segment_alignment": "right"}),
    Small("prmt", "llama", {"generation_policy": "open", "segment_alignment": "center"}),
    Small("rmt", "gpt2", {"generation_policy": "open", "wrap_pos": True}),
    Small("rmt", "gpt2", {"generation_policy": "open", "wrap_pos": True, "sliding_window": True}),
    Small("prmt", "llama", {"generation_policy": "open"}),
]
BACKBONE_OPTIONS = {"gpt2": {"learned_positions": "restart"}, "gpt_neo": {"learned_positions": "restart"}}
COVERED = {(golden.system, golden.backbone) for golden in ALL} | {(kind.system, kind.backbone) for kind in KINDS}
ALIKE = ("olmo2", "phi3", "smollm3")
"""Backbones that are Llama's but inside of their layers, which tests of layers compare: one system each is enough."""
REST = [
    Small(system, backbone, BACKBONE_OPTIONS.get(backbone, {}))
    for system in MODELS
    for backbone in sorted(BACKBONES)
    if (system, backbone) not in COVERED and (system == "armt" or backbone not in ALIKE)
]
"""Every system on every other backbone that no golden and none of `KINDS` has."""
Made = Callable[[Small], tuple[Path, RecurrentForCausalLM]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A function from a kind of model to its directory and the readable model."""

    def make(kind: Small) -> tuple[Path, RecurrentForCausalLM]:
        model = kind.build()
        directory = tmp_path_factory.mktemp("small") / "model"
        model.save_pretrained(directory)
        return directory, model

    return make


def prompts(lengths: list[int]) -> list[list[int]]:
    return [text(length)[0].tolist() for length in lengths]


@torch.no_grad()
def expected_log_probs(model: RecurrentForCausalLM, prompt: list[int], new: list[int]) -> tuple[Tensor, Tensor]:
    """What the prompt's tokens but the last predict, and what each new token was chosen from."""
    read = model(torch.tensor([prompt]), use_cache=True)
    logits = [read.logits]
    if len(new) > 1:
        logits.append(model(torch.tensor([new[:-1]]), past_key_values=read.past_key_values).logits)
    every = torch.cat(logits, 1)[0].log_softmax(-1)
    return every[: len(prompt) - 1], every[len(prompt) - 1 :]


def assert_computed(model: RecurrentForCausalLM, outputs: list) -> None:
    """Compare with the readable model in float64; where its own float32 is not near that, memories amplify rounding."""
    exact = copy.deepcopy(model).double()
    for output in outputs:
        prompt, new = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        actual = [decoded_log_probs(output)]
        if output.prompt_logprobs is not None and len(prompt) > 1:
            actual.insert(0, prompt_log_probs(output))
        rows = sum(map(len, actual))
        expected, rounded = (torch.cat(expected_log_probs(m, prompt, new))[-rows:] for m in (exact, model))
        assert relative_l2(torch.cat(actual), expected) <= max(1e-4, 20 * relative_l2(rounded, expected)), len(prompt)


def named(kinds: list[Small]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


@named(REST)
def test_every_other_system_computes_on_every_other_backbone(kind: Small, made: Made) -> None:
    directory, model = made(kind)
    with engine(directory, max_num_batched_tokens=64, enable_prefix_caching=False) as llm:
        outputs = generate(llm, prompts([S, 4 * S + 5]), greedy(S, prompt_logprobs=-1))
        assert pages_in_use(llm) == 0
    assert_computed(model, outputs)


@named(KINDS + OPEN)
def test_conversations_and_preempted_requests_resume_exactly(kind: Small, made: Made) -> None:
    directory, model = made(kind)
    said: list[int] = []
    with engine(directory, num_gpu_blocks_override=14, max_num_batched_tokens=64) as llm:
        for turn, new in enumerate(prompts([3 * S + 3, 5, 7])):
            said += new
            (output,) = generate(llm, [said], greedy(S + 3))
            assert_computed(model, [output])
            can_resume = turn > 0 and kind.options.get("segment_alignment", "left") == "left"
            assert (output.num_cached_tokens > 0) == can_resume
            said = said + list(output.outputs[0].token_ids)
        # their last segment has one token
        short = [generate(llm, prompts([1, S + 1, 2 * S + 1, 5 * S + 1]), greedy(S + 2)) for _ in range(2)]
        preempted = recorded_preemptions(llm)
        outputs = generate(llm, prompts([5, 3, 9, 20, 7, 2, S, 30, 2 * S]), greedy(3 * S))
        assert pages_in_use(llm) == 0
    assert preempted
    assert_computed(model, [*chain.from_iterable(short), *outputs])
