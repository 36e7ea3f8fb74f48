"""Random weights, made on the spot: an ARMT and its base model get the same ones, so that results can be compared.

vLLM's own `load_format="dummy"` fills everything with numbers so small that layers and memory hardly
change a result, and an engine that computed something else would not be noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers import initialization as init
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_armt.config import ARMTConfig
from vllm_armt.hf import ARMTForCausalLM

LOAD_FORMAT = "vllm_armt_random"

MEMORY_SCALE = 0.03
"""Of W_mv; and a write has the strength e^-2 / m. The memory then shows in every log-probability. At full scale
the writes of a random memory overshoot, and differences of rounding grow tenfold every few segments."""


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """vLLM's `load_format` for random weights of a model of ours, or of any that transformers knows."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is to be fetched."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Give the model a checkpoint's tensors, one at a time."""
        model.load_weights(random_tensors(model_config.hf_config, model_config.dtype))  # type: ignore[operator]


def random_tensors(config: PretrainedConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name: matrices keep the scale of what they multiply, norms are 1.

    A tensor depends on its name and shape alone, and those of an ARMT's base model are the base model's.
    """
    tied = bool(config.get_text_config().tie_word_embeddings)
    # names and shapes come from transformers; nothing is allocated
    with torch.device("meta"), init.no_init_weights():
        is_armt = isinstance(config, ARMTConfig)
        model = ARMTForCausalLM(config) if is_armt else AutoModelForCausalLM.from_config(config)
    for name, parameter in model.state_dict().items():
        if tied and name.endswith("lm_head.weight"):
            continue
        seed = crc32(name.removeprefix("model.").replace(".layer.", ".").encode() if is_armt else name.encode())
        tensor = _tensor(name, parameter.shape, seed)
        if name.endswith("W_mb.bias"):
            tensor -= math.log(config.num_mem_tokens) + 2
        elif name.endswith("W_mv.weight"):
            tensor *= MEMORY_SCALE
        yield name, tensor.to(dtype)


def _tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).div_(math.sqrt(shape[-1]))
