"""Configuration hooks: what vLLM derives from a config of ours, what we set for the user, what we refuse.

A segment is a block of vLLM's cache and memory is constant, so lengths and limits that vLLM takes from
the base model do not apply.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from vllm.config import CompilationMode, KVTransferConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.vllm import OptimizationLevel
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_armt.options import ATTENTIONS, Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_armt.config import RecurrentConfig

logger = init_logger(f"vllm.{__name__}")

SCHEDULER = "vllm_armt.integration.scheduler.SegmentScheduler"
MEMORY_SCHEDULER = "vllm_armt.integration.memory_scheduler.MemoryScheduler"
MEMORY_CONNECTOR = ("MemoryConnector", "vllm_armt.memories.engine.connector")
CPU_WORKER = "vllm_armt.integration.worker.RecurrentCPUWorker"
UNBOUNDED = 1 << 31
REQUEST_BUFFER_BYTES = 1 << 30
"""Bound on the runner's token ids, int32 `[max_num_seqs, max_model_len]`."""


class RecurrentArchConvertor(ModelArchConfigConvertorBase):
    """Sizes come from the base model; the length does so only where its learned positions grow over the text."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        limit, max_context = self.hf_config.position_limit or UNBOUNDED, self.hf_config.max_context
        # what vLLM compares a longer --max-model-len with (vllm/config/model.py: _get_and_verify_max_len)
        self.hf_text_config.model_max_length = limit
        return (max_context, "max_context") if max_context <= limit else (limit, "learned positions of the base model")

    def rswa_window(self) -> int | None:
        """The segment size, if the lengths of prompts are needed where a step is planned.

        vLLM's builders of attention metadata are given these (`rswa_prefix_lens`) only for models with
        "reference sliding window attention", which this makes ours to be. Besides them it is read by vLLM's
        own attention layers, of which we have none.
        """
        return self.hf_config.segment_size if self.hf_config.needs_prompt_length else None


class RecurrentHook(VerifyAndUpdateConfig):
    """Called by vLLM once its configuration is complete, before weights are loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what is not supported and set what a recurrent memory transformer needs.

        Raises:
            ValueError: an option is not supported, a field was overridden by what is not allowed, or a weights file is
                damaged; the message names it and what to do.
        """
        refuse_other_platforms()
        options = Options.of(vllm_config)
        refuse_unsupported(vllm_config)
        warn_of_options_without_effect(vllm_config)
        config: RecurrentConfig = vllm_config.model_config.hf_config
        config.check()
        refuse_damaged_weights(Path(vllm_config.model_config.model), config)
        segment_size = config.segment_size
        vllm_config.cache_config.block_size = segment_size
        vllm_config.cache_config.user_specified_block_size = True
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        if current_platform.is_cpu() and vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = CPU_WORKER
        # cells change shape with every step; the model runs eagerly
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        bound_limits(vllm_config, segment_size)
        if options.memories_directory is not None:
            keep_memories(vllm_config, options.memories_directory)
        if config.segment_alignment != "left" and vllm_config.cache_config.enable_prefix_caching:
            # vLLM has filled its default in by now: that someone asked for it cannot be told
            vllm_config.cache_config.enable_prefix_caching = False
            logger.info(
                "Prefix caching is off: with segment_alignment %r texts that begin alike are cut differently.",
                config.segment_alignment,
            )


def refuse_other_platforms() -> None:
    """Refuse a platform whose kernels vllm-armt was never run with.

    Raises:
        ValueError: it is neither CUDA nor a CPU.
    """
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ValueError(
            f"vllm-armt runs on NVIDIA GPUs and on CPUs; vLLM found {current_platform.device_name!r}. Use a machine "
            "with one of those, and vLLM's build for it."
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Name the first option that a recurrent memory transformer can't be served with.

    Raises:
        ValueError: there is one.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler, events, transfer = (
        vllm_config.scheduler_config,
        vllm_config.kv_events_config,
        vllm_config.kv_transfer_config,
    )
    block_size = cache.block_size if cache.user_specified_block_size else model.hf_config.segment_size
    unsupported = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "LoRA adapters at run time (--enable-lora)": vllm_config.lora_config is not None,
        "quantisation (--quantization)": model.quantization is not None,
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "context parallelism (--decode-context-parallel-size)": parallel.decode_context_parallel_size > 1,
        "context parallelism (--prefill-context-parallel-size)": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "sleep mode (--enable-sleep-mode)": model.enable_sleep_mode,
        "KV cache events (--kv-events-config)": events is not None and events.enable_kv_cache_events,
        "KV connectors (--kv-transfer-config)": not (transfer is None or _is_of_memories(transfer)),
        "KV offloading (--kv-offloading-size)": getattr(cache, "kv_offloading_size", None) is not None,
        "weights off the device (--cpu-offload-gb)": vllm_config.offload_config.uva.cpu_offload_gb > 0,
        "weights off the device (--offload-group-size)": vllm_config.offload_config.prefetch.offload_group_size > 0,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        f"--block-size {block_size} (a block is a segment)": block_size != model.hf_config.segment_size,
        "prefill in one piece (--no-enable-chunked-prefill)": not scheduler.enable_chunked_prefill,
        "a scheduler of one's own (--scheduler-cls)": scheduler.scheduler_cls
        not in (None, SCHEDULER, MEMORY_SCHEDULER),
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        f"--runner {model.runner_type}": model.runner_type != "generate",
    }
    for option, given in unsupported.items():
        if given:
            system = model.hf_config.model_type
            raise ValueError(
                f"A model of type {system!r} can't be served with {option}: not supported. Start without it."
            )


def warn_of_options_without_effect(vllm_config: VllmConfig) -> None:
    """Name what the user has given and the model does not follow; its results are the same."""
    compilation, attention = vllm_config.compilation_config, vllm_config.attention_config
    # what was not given is None; once vLLM has filled it in, it is NONE or empty
    given = {
        "--optimization-level": vllm_config.optimization_level != OptimizationLevel.O2,
        "--compilation-config mode": compilation.mode not in (None, CompilationMode.NONE),
        "--compilation-config cudagraph_mode": compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE),
        "--cudagraph-capture-sizes": bool(compilation.cudagraph_capture_sizes),
        "--max-cudagraph-capture-size": bool(compilation.max_cudagraph_capture_size),
    }
    if any(given.values()):
        logger.warning(
            "Without effect: %s. The model is not compiled, and on a GPU it records CUDA graphs of its own "
            "(none with --enforce-eager).",
            ", ".join(option for option, is_given in given.items() if is_given),
        )
    if attention.backend is not None:
        logger.warning(
            "Without effect: --attention-backend %s. How the model attends is chosen with --additional-config "
            '\'{"armt": {"attention": "..."}}\': %s.',
            attention.backend.name,
            ", ".join(ATTENTIONS),
        )


def _is_of_memories(transfer: KVTransferConfig) -> bool:
    """Whether a KV connector is the one that `keep_memories` has set, when the hook runs again."""
    name = transfer.kv_connector, transfer.kv_connector_module_path
    return name == MEMORY_CONNECTOR and "model" in transfer.kv_connector_extra_config


def keep_memories(vllm_config: VllmConfig, directory: Path) -> None:
    """Set what a server needs that keeps memories in a folder.

    Raises:
        ValueError: this model has none that could be kept, or the folder can't be used.
    """
    from vllm_armt.memories.errors import MemoriesError
    from vllm_armt.memories.identity import identify

    config: RecurrentConfig = vllm_config.model_config.hf_config
    reasons = {
        "segments are counted from the prompt's end (`segment_alignment` is "
        f"{config.segment_alignment!r}, not 'left'), so that one text more moves them all": (
            config.segment_alignment != "left"
        ),
        "learned positions grow over the text (`learned_positions` is 'grow'), which a memory ends": (
            config.segment_layout.stride != 0
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f'Memories can\'t be kept: {reason}. Start without additional_config["armt"]["memories"].')
    try:
        model = identify(vllm_config, directory)
    except MemoriesError as error:
        raise ValueError(f"Memories can't be kept in {directory}. {error}") from error
    vllm_config.scheduler_config.scheduler_cls = MEMORY_SCHEDULER
    connector, module = MEMORY_CONNECTOR
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=connector,
        kv_connector_module_path=module,
        # a consumer's pages are freed late with overlapping steps, for loads that no stream orders; ours are
        kv_role="kv_producer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={"model": asdict(model)},
    )


def refuse_damaged_weights(directory: Path, config: RecurrentConfig) -> None:
    """Name the first weights file of a local checkpoint that is cut off, and sizes that its tensors do not have.

    Only headers are read; vLLM would make a model of whatever sizes config.json says before it opens a file.

    Raises:
        ValueError: there is one.
    """
    from vllm_armt.checkpoints.files import regular_file
    from vllm_armt.checkpoints.looks import refuse_other_base

    shapes: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        regular_file(file)
        try:
            # checks the header against the file's size and reads no tensor
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no dict)
                    if name.startswith("model."):
                        shapes[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}). Copy or download it again.") from error
    if shapes:
        refuse_other_base(shapes, config.base_model_config, "config.json")


def bound_limits(vllm_config: VllmConfig, segment_size: int) -> None:
    """Give every step room for a segment, and keep the runner's per-request buffers in bounds."""
    from vllm_armt.integration.sharing import legal_limits

    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    most = max(1, REQUEST_BUFFER_BYTES // (4 * max_model_len))
    if scheduler.max_num_seqs > most:
        logger.info(
            "max_num_seqs is lowered from %d to %d: with max_model_len=%d the buffers of more requests would take "
            "over %d MiB. Lower --max-model-len to serve more requests at a time.",
            scheduler.max_num_seqs,
            most,
            max_model_len,
            REQUEST_BUFFER_BYTES >> 20,
        )
        scheduler.max_num_seqs = most
    if scheduler.max_num_active_seqs is not None:
        scheduler.max_num_active_seqs = min(scheduler.max_num_active_seqs, scheduler.max_num_seqs)
    given, threshold = scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold
    scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold = legal_limits(
        segment_size, scheduler.max_num_seqs, given, threshold
    )
    if scheduler.long_prefill_token_threshold > threshold:
        logger.info(
            "long_prefill_token_threshold is raised from %d to %d: whole segments (of %d tokens) are read.",
            threshold,
            scheduler.long_prefill_token_threshold,
            segment_size,
        )
    if scheduler.max_num_scheduled_tokens is not None:
        least = segment_size + scheduler.max_num_seqs
        _log_raised("max_num_scheduled_tokens", scheduler.max_num_scheduled_tokens, least, segment_size)
        scheduler.max_num_scheduled_tokens = max(scheduler.max_num_scheduled_tokens, least)
    _log_raised("max_num_batched_tokens", given, scheduler.max_num_batched_tokens, segment_size)


def _log_raised(name: str, given: int, used: int, segment_size: int) -> None:
    if used > given:
        logger.info(
            "%s is raised from %d to %d: a step must fit a segment (%d tokens) beside one token of every request (%d).",
            name,
            given,
            used,
            segment_size,
            used - segment_size,
        )
