"""Every system for transformers; importing this package makes the Auto classes know their `model_type`s."""

from transformers import AutoConfig, AutoModelForCausalLM

from vllm_armt.config import ARMTConfig, ARMTSWConfig, PRMTConfig, RMTConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.modeling_armt import ARMTForCausalLM, ARMTSlidingWindowForCausalLM
from vllm_armt.hf.modeling_recurrent import RecurrentForCausalLM, is_memory
from vllm_armt.hf.modeling_rmt import PRMTForCausalLM, RMTForCausalLM

MODELS: dict[str, type[RecurrentForCausalLM]] = {
    model.config_class.model_type: model
    for model in (ARMTForCausalLM, ARMTSlidingWindowForCausalLM, PRMTForCausalLM, RMTForCausalLM)
}
"""By `model_type`."""

for _model in MODELS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "MODELS",
    "ARMTConfig",
    "ARMTForCausalLM",
    "ARMTSWConfig",
    "ARMTSlidingWindowForCausalLM",
    "PRMTConfig",
    "PRMTForCausalLM",
    "RMTConfig",
    "RMTForCausalLM",
    "RecurrentCache",
    "RecurrentForCausalLM",
    "is_memory",
]
