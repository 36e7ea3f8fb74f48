"""What a checkpoint is served as on this machine: vLLM's own configuration of it, with all that the plugin sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.choose import BACKENDS
from vllm_armt.config import RecurrentConfig
from vllm_armt.doctor.findings import Finding
from vllm_armt.integration.cache import SegmentSpec
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
    yield _attention(vllm_config)
    yield _requests(vllm_config, config)


def _attention(vllm_config: VllmConfig) -> Finding:
    model, config = vllm_config.model_config, vllm_config.model_config.hf_config
    kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
    layout = config.page_layout(kv_heads, model.get_head_size(), model.dtype)
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    shape = AttentionShape(
        model.dtype,
        heads,
        kv_heads,
        model.get_head_size(),
        config.segment_layout,
        layout.columns,
        config.window,
        # of the layers that see least
        min(filter(None, config.reaches), default=None),
    )
    device = torch.device(vllm_config.device_config.device)
    reasons = {name: backend.why_not(device, shape) for name, backend in BACKENDS.items()}
    usable = [name for name, reason in reasons.items() if not reason]
    refused = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return Finding(
        "attention", "ok", f"{usable[0]}; also {', '.join(usable[1:]) or 'none'}. Not here: {refused or 'none'}."
    )


def _requests(vllm_config: VllmConfig, config: RecurrentConfig) -> Finding:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    layout = config.page_layout(model.get_num_kv_heads(vllm_config.parallel_config), model.get_head_size(), model.dtype)
    layer = SegmentSpec.create(config.segment_size, layout.page_bytes).max_memory_usage_bytes(vllm_config)
    request = layer * config.base_model_config.num_hidden_layers
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
