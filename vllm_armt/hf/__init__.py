"""ARMT for transformers; importing this package makes the Auto classes know `model_type` "armt"."""

from transformers import AutoConfig, AutoModelForCausalLM

from vllm_armt.config import ARMTConfig
from vllm_armt.hf.cache import ARMTCache
from vllm_armt.hf.modeling_armt import ARMTForCausalLM

AutoConfig.register(ARMTConfig.model_type, ARMTConfig, exist_ok=True)
AutoModelForCausalLM.register(ARMTConfig, ARMTForCausalLM, exist_ok=True)

__all__ = ["ARMTCache", "ARMTConfig", "ARMTForCausalLM"]
