"""Modules as one of several tensor-parallel ranks holds them, without ranks, and multiplied by a backend of choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from vllm_armt.linear.base import Gemm
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.models.backbones import layers_class
from vllm_armt.models.backbones.decoder import DecoderLayers

CPU = torch.device("cpu")


@contextmanager
def on_rank(rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Pretend to be one of `world_size` tensor-parallel ranks while modules are built."""
    with (
        patch("vllm_armt.linear.weight.get_tensor_model_parallel_rank", lambda: rank),
        patch("vllm_armt.linear.weight.get_tensor_model_parallel_world_size", lambda: world_size),
        patch("vllm_armt.linear.stacked.get_tensor_model_parallel_world_size", lambda: world_size),
        patch("vllm_armt.models.backbones.decoder.get_tensor_model_parallel_world_size", lambda: world_size),
    ):
        yield


def multiplied_by(gemm: type[Gemm]):
    """Choose a backend, whatever the device, while modules are built."""
    return patch("vllm_armt.linear.stacked.choose_gemm", lambda *_: gemm())


def process_weights(module: nn.Module) -> None:
    """What vLLM does when all weights are loaded."""
    for layer in module.modules():
        if isinstance(layer, StackedLinear):
            layer.quant_method.process_weights_after_loading(layer)


def grouped_layers(
    config: PretrainedConfig,
    num_positions: int,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> DecoderLayers:
    """Grouped layers of a base model's configuration, their weights not yet loaded."""
    # vLLM gives all layers of a shape the same positions, those of other tests too
    own_positions = patch.dict(_ROPE_DICT, clear=True)
    with on_rank(rank, world_size), own_positions, set_current_vllm_config(VllmConfig()), device:
        return layers_class(config)(config, num_positions, dtype)
