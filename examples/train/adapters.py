"""LoRA on a base model whose memory is trained whole."""

from __future__ import annotations

from typing import Any

from vllm_armt.hf import RecurrentForCausalLM, is_memory

ADAPTER = "default"


class Adapters:
    """Adapters in a model, which is changed in place; the base model's own weights are frozen.

    Args:
        model: what is trained.
        options: of peft's `LoraConfig`, `target_modules` at least.

    Raises:
        ValueError: memory tokens have positions of their own in the base model's table, which would stay as drawn.
    """

    def __init__(self, model: RecurrentForCausalLM, options: dict[str, Any]) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        if model.config.extra_positions:
            raise ValueError(
                "The memory tokens of this model have learned positions of their own (`wrap_pos`), in a table of the "
                "base model, which LoRA freezes. Train without `lora`, or a model without `wrap_pos`."
            )
        memory = {name for name, _ in model.named_parameters() if is_memory(name)}
        # injected and not wrapped, so that the model keeps its class, its config and its calls
        self.lora = LoraModel(model, LoraConfig(**options), ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in memory or ".lora_" in name)

    def merge(self) -> RecurrentForCausalLM:
        """The model with its adapters merged into its weights."""
        merged = self.lora.merge_and_unload()
        assert isinstance(merged, RecurrentForCausalLM)
        return merged
