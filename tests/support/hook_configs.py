"""vLLM's configurations of small checkpoints, the hook included."""

from __future__ import annotations

from typing import Any

from vllm.config import (
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)

from vllm_armt.config import RecurrentConfig

S = 16


def model_config(checkpoint: str, **fields: Any) -> ModelConfig:
    return ModelConfig(model=checkpoint, tokenizer=checkpoint, skip_tokenizer_init=True, **fields)


LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}


def complete(
    checkpoint: str, *, max_model_len: int | None = None, given: dict[str, Any] | None = None, **limits: Any
) -> VllmConfig:
    """The configuration that vLLM makes for the checkpoint, the hook included."""
    model = model_config(checkpoint, dtype="float32", max_model_len=max_model_len)
    scheduler = SchedulerConfig(max_model_len=model.max_model_len, is_encoder_decoder=False, **limits)
    return VllmConfig(model_config=model, scheduler_config=scheduler, **(given or {}))


BASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "max_position_embeddings": 1024},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024},
    "gpt2": {"n_positions": 1024},
    "gpt_neox": {"max_position_embeddings": 1024},
}


def wrapped(config_class: type[RecurrentConfig], base: str = "llama", **fields: Any) -> RecurrentConfig:
    """A configuration around a small base model."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    memory = {"d_mem": 8} if "d_mem" in config_class.required else {}
    return config_class(
        base_model_config={"model_type": base, **sizes, **BASES[base]},
        segment_size=S,
        num_mem_tokens=4,
        **memory,
        **fields,
    )
