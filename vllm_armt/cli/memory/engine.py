"""An engine in this process that keeps memories, for one request at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_armt.cli.bench.engines import ENVIRONMENT
from vllm_armt.cli.memory.options import MAX_BYTES
from vllm_armt.cli.values import json_object, whole_number

if TYPE_CHECKING:
    from vllm import LLM

PAGES = 16
"""More than one request ever holds."""
MAX_MODEL_LEN = 1 << 18
"""Tokens of one request, where the model takes more: a text is read in pieces, and a question is short."""


@contextmanager
def engine(directory: Path, folder: Path, dtype: str, max_bytes: str | None, options: str) -> Iterator[LLM]:
    """An engine, with a line on stderr while it starts.

    Args:
        directory: of the checkpoint.
        folder: of memories.
        dtype: as vLLM's.
        max_bytes: of the model's files in the folder.
        options: further arguments of `vllm.LLM` as JSON, which win.

    Raises:
        ValueError: an option has a value that is not allowed, or the model can't be served.
    """
    given = json_object("--engine", options)
    if "additional_config" in given:
        raise ValueError("--engine can't hold additional_config, which says where memories are. Leave it out.")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is no checkpoint: it has no config.json.")
    armt: dict[str, Any] = {"memories": str(folder)}
    if max_bytes is not None:
        armt["memories_max_bytes"] = whole_number(MAX_BYTES, max_bytes)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from rich.console import Console
    from vllm import LLM

    longest = json.loads((directory / "config.json").read_text()).get("max_context", MAX_MODEL_LEN)
    wanted = {
        "dtype": dtype,
        "additional_config": {"armt": armt},
        "max_model_len": min(MAX_MODEL_LEN, longest),
        "max_num_seqs": 1,
        "num_gpu_blocks_override": PAGES,
        # more than the pages take; with it given, a full machine is no reason not to start
        "kv_cache_memory_bytes": 1 << 31,
        "gpu_memory_utilization": 0.01,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
    }
    with Console(stderr=True).status(f"starting an engine for {directory}"):
        llm = LLM(str(directory), **(wanted | given))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
