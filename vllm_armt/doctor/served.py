"""What a checkpoint is served as on this machine: vLLM's own configuration of it, with all that the plugin sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from vllm_armt.attention.base import AttentionShape
from vllm_armt.config import RecurrentConfig
from vllm_armt.doctor.attention import attention
from vllm_armt.doctor.findings import Finding
from vllm_armt.integration.capacity import RequestMemory
from vllm_armt.models.backbones import layers_class
from vllm_armt.options import Options


def served(directory: Path) -> Iterator[Finding]:
    """How vLLM would run it with no option given, and how many requests fit.

    Raises:
        ValueError: it would not; the message says why.
    """
    arguments = EngineArgs(model=str(directory), skip_tokenizer_init=True)
    vllm_config = arguments.create_engine_config()
    model, config = vllm_config.model_config, vllm_config.model_config.hf_config
    with set_current_vllm_config(vllm_config):
        # refuses options of the base model that its layers do not compute
        layers_class(config.base_model_config).architecture(config.base_model_config)
    options = Options.of(vllm_config)
    yield Finding(
        "served as",
        "ok",
        f"{model.architecture} in {str(model.dtype).removeprefix('torch.')}, schedule {options.schedule}, texts of up "
        f"to {model.max_model_len:,} tokens, at most {vllm_config.scheduler_config.max_num_seqs} requests a step.",
    )
    yield attention(vllm_config.device_config.device_type, _shape(vllm_config))
    yield _requests(vllm_config)


def _shape(vllm_config: VllmConfig) -> AttentionShape:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config: RecurrentConfig = model.hf_config
    kv_heads, head_size = model.get_num_kv_heads(parallel), model.get_head_size()
    columns = config.page_layout(kv_heads, head_size, model.dtype).columns
    heads = model.get_num_attention_heads(parallel)
    # of the layers that see least
    reach = min(filter(None, config.reaches), default=None)
    layout, window = config.segment_layout, config.window
    return AttentionShape(model.dtype, heads, kv_heads, head_size, layout, columns, window, reach)


def _requests(vllm_config: VllmConfig) -> Finding:
    cache, request = vllm_config.cache_config, RequestMemory.of(vllm_config).bytes
    pool, bound = cache.kv_cache_memory_bytes, "--kv-cache-memory-bytes or VLLM_CPU_KVCACHE_SPACE"
    if pool is None:
        # vLLM measures at the start what weights and activations leave of it
        total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
        pool, bound = int(total * cache.gpu_memory_utilization), "of which weights and activations take their part"
    return Finding(
        "memory",
        "ok" if pool >= request else "wrong",
        f"A request takes {request / 1e6:,.2f} MB, however long its text is; {pool // request:,} fit into "
        f"{pool / 1e9:,.1f} GB ({bound}).",
    )
