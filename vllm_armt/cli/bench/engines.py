"""Engines in this process: an ARMT's, and vLLM's own for its base model, so that runs of both can take turns.

Two engines fit one process: each is stepped by whoever calls it and costs nothing while it waits. They share
vLLM's process groups, so they are shut down together. On CPUs an engine in this process computes on all cores
(a server of its own leaves one to the frontend), and `VLLM_CPU_OMP_THREADS_BIND` has no effect on it.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_armt.cli.bench.shapes import Model

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # what a command writes on stdout is its result; vLLM's log goes there by default
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
IGNORED_ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE",)
"""What would override the sizes that a benchmark asks for."""

MAX_NUM_SEQS = 64

BASE_BLOCK = 256
"""Tokens of a block of vLLM's own cache at most."""

PAGES_PER_REQUEST = 6
"""More than a request ever holds, with steps that overlap and a snapshot in the prefix cache."""


class Engine:
    """One engine in this process and what is asked of its insides."""

    def __init__(self, llm: LLM) -> None:
        from vllm.distributed.kv_transfer import kv_transfer_state

        self.llm = llm
        self.core: Any = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        self._connector = kv_transfer_state._KV_CONNECTOR_AGENT

    def take_turn(self) -> None:
        """Be the engine that runs next: all engines of a process share vLLM's one place for a KV connector."""
        _place_connector(self._connector)

    @property
    def setting(self) -> dict[str, Any]:
        """The limits that the engine runs with, the threads that it computes with, and an ARMT's attention."""
        import torch

        from vllm_armt.config import RecurrentConfig

        config = self.llm.llm_engine.vllm_config
        setting = {
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_model_len": config.model_config.max_model_len,
            "threads": torch.get_num_threads(),
        }
        if isinstance(config.model_config.hf_config, RecurrentConfig):
            setting["attention"] = self.builder.planner.attention.name
        return setting

    @property
    def step_tokens(self) -> int:
        """Tokens of one step at most."""
        return self.setting["max_num_batched_tokens"]

    @property
    def block_size(self) -> int:
        """Tokens of a block of the cache; with an ARMT, a segment."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    @property
    def vocab_size(self) -> int:
        """Tokens that a prompt may have."""
        return self.llm.llm_engine.model_config.get_vocab_size()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of vLLM's pool, all layers together."""
        config = self.core.scheduler.kv_cache_config
        return sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks

    @property
    def blocks_in_use(self) -> int:
        """Blocks that requests hold; vLLM's null block is not one."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - self.free_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that requests could have."""
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def builder(self) -> Any:
        """What turns vLLM's batch into a step of ours."""
        return self.runner.attn_groups[0][0].metadata_builders[0]

    def choose_schedule(self, mode: str) -> None:
        """Let the steps from now on run in the order `mode` of the plugin's option `schedule`."""
        planner = self.builder.planner
        planner.schedule = replace(planner.schedule, mode=mode)


@contextmanager
def engines(*wanted: dict[str, Any]) -> Iterator[list[Engine]]:
    """Start engines, each given as the arguments of `start`; all end together."""
    with ExitStack() as stack:
        started: list[Engine] = []
        stack.callback(_shut_down, started)
        for options in wanted:
            started.append(start(stack, **options))
        yield started


def start(
    stack: ExitStack,
    model: Model,
    *,
    max_model_len: int,
    base: bool = False,
    documents: int = 1,
    step_tokens: int | None = None,
    prefix_caching: bool = False,
    cached_tokens: int | None = None,
    memories: Path | None = None,
) -> Engine:
    """An engine with everything at vLLM's defaults but what is given here.

    Args:
        stack: keeps the checkpoint's directory.
        model: what is served.
        max_model_len: tokens of the longest request.
        base: whether the base model is served, by vLLM's own model class.
        documents: requests of that length that the cache must hold at a time.
        step_tokens: `max_num_batched_tokens`.
        prefix_caching: whether requests find what earlier ones left.
        cached_tokens: of which the base model's cache must hold keys and values. [default: of all documents]
        memories: folder in which it keeps memories.
    """
    from safetensors.torch import save_file
    from vllm import LLM

    from vllm_armt.cli.bench.weights import LOAD_FORMAT

    _place_connector(None)
    directory, is_random = model.directory, model.directory is None
    if base or directory is None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-armt-bench-")))
        config = _base_config(model, max_model_len) if base else model.config
        config.save_pretrained(directory)
        if memories is not None:
            # memories are known by the weights' file; what is in it, the load format makes up
            save_file({}, directory / "model.safetensors")
    if base:
        # every request may leave its last block of the cache nearly empty
        held = ((cached_tokens or documents * max_model_len) + documents * BASE_BLOCK) * model.kv_bytes_per_token
        spare = 8 * BASE_BLOCK * model.kv_bytes_per_token
    else:
        held, spare = documents * PAGES_PER_REQUEST * model.page_bytes, 8 * model.page_bytes
    llm = LLM(
        str(directory),
        load_format=LOAD_FORMAT if base or is_random else "auto",
        dtype=model.dtype,  # type: ignore[arg-type]
        skip_tokenizer_init=True,
        enable_prefix_caching=prefix_caching,
        max_model_len=max_model_len,
        max_num_seqs=max(MAX_NUM_SEQS, documents),
        max_num_batched_tokens=step_tokens,
        kv_cache_memory_bytes=held + spare,
        # with the cache's size given it is only a check at the start, which a second engine would fail
        gpu_memory_utilization=0.01,
        additional_config={} if memories is None else {"armt": {"memories": str(memories)}},
    )
    return Engine(llm)


def prompt(engine: Engine, tokens: int, seed: int = 0) -> list[int]:
    """Random tokens; the same for the same seed, and a shorter one is the beginning of a longer one."""
    return random.Random(seed).choices(range(engine.vocab_size), k=tokens)


def _base_config(model: Model, max_model_len: int) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = deepcopy(model.base)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.max_position_embeddings = max(config.max_position_embeddings, max_model_len)
    config.dtype = model.dtype
    return config


def _place_connector(connector: Any) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state

    kv_transfer_state._KV_CONNECTOR_AGENT = connector


def _shut_down(engines: list[Engine]) -> None:
    for engine in engines:
        engine.take_turn()
        engine.llm.llm_engine.engine_core.shutdown()
        del engine.llm, engine.core
    gc.collect()


@contextmanager
def environment() -> Iterator[None]:
    """The environment in which a benchmark runs: vLLM in this process and quiet. It is given back afterwards."""
    before = {name: os.environ.get(name) for name in (*ENVIRONMENT, *IGNORED_ENVIRONMENT)}
    os.environ.update(ENVIRONMENT)
    for name in IGNORED_ENVIRONMENT:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
