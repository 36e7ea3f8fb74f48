"""What a request takes of the cache, how many fit, and the paragraph that a worker begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm.logger import init_logger

from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_armt.config import RecurrentConfig

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class RequestMemory:
    """What a request takes of one rank's cache at most, whatever its length; a segment that stays open may take more.

    Attributes:
        pages: at a time.
        page_bytes: of a page, all layers.
    """

    pages: int
    page_bytes: int

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Self:
        """That of the requests of a server."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config: RecurrentConfig = model.hf_config
        layout = config.page_layout(model.get_num_kv_heads(parallel), model.get_head_size(), model.dtype)
        spec = SegmentSpec.create(config.segment_size, layout.page_bytes)
        pages = spec.max_memory_usage_bytes(vllm_config) // layout.page_bytes
        return cls(pages, layout.page_bytes * config.base_model_config.num_hidden_layers)

    @property
    def bytes(self) -> int:
        return self.pages * self.page_bytes


def announce(vllm_config: VllmConfig, attention: str) -> None:
    """Say in the log, on one rank, what is served and how, and what vLLM's own lines mean for it.

    Args:
        vllm_config: whose pool vLLM has measured.
        attention: the backend that was chosen.
    """
    logger.info_once("%s", paragraph(vllm_config, attention), scope="global")


def paragraph(vllm_config: VllmConfig, attention: str) -> str:
    """What `announce` says."""
    config: RecurrentConfig = vllm_config.model_config.hf_config
    scheduler, ranks = vllm_config.scheduler_config, vllm_config.parallel_config.tensor_parallel_size
    options, request = Options.of(vllm_config), RequestMemory.of(vllm_config)
    pool = vllm_config.cache_config.num_gpu_blocks
    assert pool is not None
    # one is vLLM's null block
    fit, S = (pool - 1) // request.pages, config.segment_size
    is_open = config.generation_policy == "open"
    sentences = [
        f"Serving {config.model_type} on {config.base_model_config.model_type}: segments of S = {S} tokens with "
        f"m = {config.num_mem_tokens} memory tokens, schedule {options.schedule!r}, attention {attention!r}.",
        f"A request takes {_megabytes(request.bytes)} of cache{f' on each of {ranks} ranks' if ranks > 1 else ''}, "
        f"however long its text is ({request.pages} pages of {_megabytes(request.page_bytes)})"
        + ("; for each S tokens that it generates beyond its last segment, which stays open, a page more" * is_open)
        + f". {fit:,} requests fit at a time, and --max-num-seqs lets {scheduler.max_num_seqs:,} run; this is what "
        f'vLLM\'s line "Maximum concurrency" counts, and it holds for texts of any length.',
        _of_memories(options),
        "vLLM warns of a custom scheduler class: it is this plugin's, on top of vLLM's own, and steps "
        + ("overlap (--async-scheduling)." if scheduler.async_scheduling else "do not overlap here."),
    ]
    return " ".join(sentences)


def _of_memories(options: Options) -> str:
    if options.memories_directory is None:
        return "No memories are kept (`vllm-armt serve --memories FOLDER` does)."
    prefixes = ", and those of ordinary prompts" * options.keeps_prefixes
    return f"Memories are kept in {options.memories_directory}{prefixes}."


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
