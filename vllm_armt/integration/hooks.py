"""Configuration hooks: what vLLM derives from a config of ours, what we set for the user, what we refuse.

A segment is a block of vLLM's cache and memory is constant, so lengths and limits that vLLM takes from
the base model do not apply.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from vllm.config import CompilationMode
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_armt.integration.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_armt.config import RecurrentConfig

logger = init_logger(f"vllm.{__name__}")

SCHEDULER = "vllm_armt.integration.scheduler.SegmentScheduler"
CPU_WORKER = "vllm_armt.integration.worker.SeedSafeCPUWorker"
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
            ValueError: an option is not supported, or a weights file is damaged; the message names it and what
                to do.
        """
        refuse_unsupported(vllm_config)
        Options.of(vllm_config)
        refuse_damaged_weights(Path(vllm_config.model_config.model))
        config: RecurrentConfig = vllm_config.model_config.hf_config
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
        if config.segment_alignment != "left" and vllm_config.cache_config.enable_prefix_caching:
            # vLLM has filled its default in by now: that someone asked for it cannot be told
            vllm_config.cache_config.enable_prefix_caching = False
            logger.info(
                "Prefix caching is off: with segment_alignment %r texts that begin alike are cut differently.",
                config.segment_alignment,
            )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Name the first option that a recurrent memory transformer can't be served with.

    Raises:
        ValueError: there is one.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    block_size = cache.block_size if cache.user_specified_block_size else model.hf_config.segment_size
    unsupported = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "LoRA adapters at run time (--enable-lora)": vllm_config.lora_config is not None,
        "quantisation (--quantization)": model.quantization is not None,
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "context parallelism (--decode-context-parallel-size)": parallel.decode_context_parallel_size > 1,
        "context parallelism (--prefill-context-parallel-size)": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "KV connectors (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "KV offloading (--kv-offloading-size)": getattr(cache, "kv_offloading_size", None) is not None,
        "weights off the device (--cpu-offload-gb)": vllm_config.offload_config.uva.cpu_offload_gb > 0,
        "weights off the device (--offload-group-size)": vllm_config.offload_config.prefetch.offload_group_size > 0,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        f"--block-size {block_size} (a block is a segment)": block_size != model.hf_config.segment_size,
        "prefill in one piece (--no-enable-chunked-prefill)": not scheduler.enable_chunked_prefill,
        "a scheduler of one's own (--scheduler-cls)": scheduler.scheduler_cls not in (None, SCHEDULER),
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        f"--runner {model.runner_type}": model.runner_type != "generate",
    }
    for option, given in unsupported.items():
        if given:
            system = model.hf_config.model_type
            raise ValueError(
                f"A model of type {system!r} can't be served with {option}: not supported. Start without it."
            )


def refuse_damaged_weights(directory: Path) -> None:
    """Name the first weights file of a local checkpoint that is cut off, before vLLM trips over it.

    Raises:
        ValueError: there is one.
    """
    for file in sorted(directory.glob("*.safetensors")):
        try:
            # checks the header against the file's size and reads no tensor
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}). Copy or download it again.") from error


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
    given = scheduler.max_num_batched_tokens
    scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold = legal_limits(
        segment_size, scheduler.max_num_seqs, given, scheduler.long_prefill_token_threshold
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
