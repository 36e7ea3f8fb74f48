"""Engines that keep memories, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.support.engines import decoded_log_probs, engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.small_hf import Small
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.engine.admission import Admission
from vllm_armt.memories.engine.connector import MemoryConnector
from vllm_armt.memories.engine.page_io import PageIO

VOCAB = 192

Made = Callable[[Small], Path]


@contextmanager
def memory_engine(directory: Path, folder: Path | str, *, overlapping: bool = False, **options: Any) -> Iterator[LLM]:
    """An engine that keeps memories in a folder.

    Args:
        directory: of the model.
        folder: of memories, perhaps with ",prefix".
        overlapping: whether a step is scheduled while the one before is running, which vLLM leaves to GPUs.
        options: of the engine; those of memories by name.
    """
    armt = {"memories": str(folder)} | {key: options.pop(key) for key in list(options) if key.startswith("memories_")}
    defaults: dict[str, Any] = {"additional_config": {"armt": armt}, "max_num_batched_tokens": 64}
    with engine(directory, overlap=overlapping, **(defaults | options)) as llm:
        yield llm


def ids(length: int, seed: int = 0) -> list[int]:
    """Random tokens, in every test model's vocabulary; the same beginning for the same seed."""
    return torch.randint(2, VOCAB, (1 << 12,), generator=torch.Generator().manual_seed(seed))[:length].tolist()


def asking(max_tokens: int, **extra: Any) -> SamplingParams:
    """Greedy decoding, with what is asked of memories."""
    params = greedy(max_tokens)
    params.extra_args = extra
    return params


def ask(llm: LLM, prompts: Sequence[list[int]], max_tokens: int = 6, **extra: Any) -> list[RequestOutput]:
    """Every prompt with the same things asked of memories."""
    return generate(llm, prompts, [asking(max_tokens, **extra) for _ in prompts])


def save(llm: LLM, text: list[int], name: str, **extra: Any) -> dict[str, Any]:
    """Read a text into a memory; what the response says of it."""
    (output,) = ask(llm, [text], 1, save_memory={"name": name, "after": "prompt"}, **extra)
    assert output.outputs[0].finish_reason == "length", output.outputs[0].stop_reason
    saved = info(output)["saved"]
    assert "error" not in saved, saved
    return saved


def info(output: RequestOutput) -> dict[str, Any]:
    """What a response says of memories."""
    assert output.kv_transfer_params is not None
    return output.kv_transfer_params["memory"]


def refusal(output: RequestOutput) -> tuple[int, str]:
    """HTTP's status and the sentence with which a request was refused."""
    (answer,) = output.outputs
    assert answer.finish_reason == "error"
    assert answer.stop_reason == info(output)["error"]
    return info(output)["status"], str(answer.stop_reason)


def distance(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> float:
    """The largest difference of log-probabilities, of all new tokens and the whole vocabulary."""
    pairs = zip(outputs, others, strict=True)
    return max((decoded_log_probs(one) - decoded_log_probs(other)).abs().max().item() for one, other in pairs)


def tolerance(*plain: Sequence[RequestOutput]) -> float:
    """What log-probabilities behind a memory may differ by from those behind its text.

    Twice the largest distance of any two schedules of the whole text, as the largest of so many differences is a matter
    of chance itself; at least 1e-5.
    """
    return max(1e-5, *(2 * distance(one, other) for one, other in combinations(plain, 2)))


def admission_of(llm: LLM) -> Admission:
    connector = scheduler_of(llm).connector
    assert isinstance(connector, MemoryConnector)
    return connector.admission


def io_of(llm: LLM) -> PageIO:
    """Of an engine in this process."""
    worker = get_kv_transfer_group()
    assert isinstance(worker, MemoryConnector)
    return worker.io


def store_of(llm: LLM) -> Store:
    return admission_of(llm).store


def check_nothing_is_left(llm: LLM) -> None:
    """No request, page, lease or save is held when all have been answered."""
    admission = admission_of(llm)
    assert pages_in_use(llm) == 0
    assert {block.ref_cnt for block in scheduler_of(llm).kv_cache_manager.block_pool.blocks[1:]} == {0}
    assert not scheduler_of(llm).requests
    assert not admission.sessions
    assert not admission.saves.are_waited_for
    assert not admission.opening._leases
    assert not io_of(llm)._pages
