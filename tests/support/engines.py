"""Engines for tests, and what is read out of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler


@contextmanager
def quick_collections() -> Iterator[None]:
    """Keep what is there out of garbage collections.

    vLLM starts and ends an engine with eight of them, half a second each over all that a test process has imported.
    """
    gc.freeze()
    try:
        # vLLM lets go of what it froze itself, and of everything else with it
        with patch.object(gc, "unfreeze"):
            yield
    finally:
        gc.unfreeze()
        gc.collect()


@contextmanager
def overlapping_steps() -> Iterator[None]:
    """Let engines schedule a step while the one before runs; vLLM's CPU platform turns that off at the end."""
    check = type(current_platform).check_and_update_config.__func__  # type: ignore[attr-defined]

    def keep(cls: type, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with patch.object(type(current_platform), "check_and_update_config", classmethod(keep)):
        yield


@contextmanager
def engine(directory: Path, *, overlap: bool = False, **options: Any) -> Iterator[LLM]:
    """An in-process engine without tokenizer that reports log-probabilities of the whole vocabulary.

    Args:
        directory: of the checkpoint.
        overlap: whether steps overlap, as on GPUs.
        options: of vLLM, and the plugin's `schedule`.
    """
    schedule = options.pop("schedule", "auto")
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        # given in bytes, as a GPU's free memory would hold millions of these small pages; the share is only checked
        "kv_cache_memory_bytes": 1 << 26,
        "gpu_memory_utilization": 0.01,
        # as on CPUs, where vLLM turns it off
        "async_scheduling": False,
        "additional_config": {"armt": {"schedule": schedule}},
    }
    with quick_collections(), overlapping_steps() if overlap else nullcontext():
        llm = LLM(str(directory), **(defaults | options))
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == overlap
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm


def scheduler_of(llm: LLM) -> Scheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


class Preemption(NamedTuple):
    """A request that lost its pages, and the tokens that it had computed and generated."""

    request: str
    computed: int
    generated: int


def recorded_preemptions(llm: LLM) -> list[Preemption]:
    """The preemptions from now on."""
    preempted = []
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request

    def record_and_preempt(request, *args, **kwargs):
        preempted.append(Preemption(request.request_id, request.num_computed_tokens, request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = record_and_preempt
    return preempted


def pages_in_use(llm: LLM) -> int:
    """Pages that some request holds; vLLM's null block is not one."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def generate(llm: LLM, prompts: Sequence[Tensor | list[int]], params: Any) -> list[RequestOutput]:
    requests = [{"prompt_token_ids": list(map(int, prompt))} for prompt in prompts]
    return llm.generate(requests, params, use_tqdm=False)  # type: ignore[arg-type]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Greedy decoding of exactly `max_tokens` tokens with the log-probabilities of the whole vocabulary."""
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=-1, **options
    )


def log_probs(positions: Sequence[Any]) -> Tensor:
    """vLLM's log-probability dicts as `[positions, V]`."""
    return torch.tensor([[position[token].logprob for token in range(len(position))] for position in positions])


def prompt_log_probs(output: RequestOutput) -> Tensor:
    """`[T - 1, V]`: what the prompt's tokens but the last predict."""
    return log_probs(output.prompt_logprobs[1:])  # type: ignore[index]


def decoded_log_probs(output: RequestOutput) -> Tensor:
    """`[n, V]`: what each new token was chosen from."""
    return log_probs(output.outputs[0].logprobs)  # type: ignore[arg-type]


def centred(logits: Tensor) -> Tensor:
    """Logits without the constant per row that log-probabilities don't know."""
    return logits - logits.mean(dim=-1, keepdim=True)
