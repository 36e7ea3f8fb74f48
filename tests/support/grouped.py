"""Modules as one of several tensor-parallel ranks holds them, without ranks."""

from __future__ import annotations

from unittest.mock import patch

import torch
from transformers import PretrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_armt.models.backbones import layers_class
from vllm_armt.models.backbones.decoder import DecoderLayers


def on_rank(rank: int = 0, world_size: int = 1):
    """Pretend to be one of `world_size` tensor-parallel ranks while modules are built."""
    return patch.multiple(
        "vllm_armt.linear.stacked",
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_world_size=lambda: world_size,
    )


def grouped_layers(config: PretrainedConfig, num_positions: int, rank: int = 0, world_size: int = 1) -> DecoderLayers:
    """Grouped layers of a base model's configuration, their weights not yet loaded."""
    world = patch("vllm_armt.models.backbones.decoder.get_tensor_model_parallel_world_size", lambda: world_size)
    with on_rank(rank, world_size), world, set_current_vllm_config(VllmConfig()):
        return layers_class(config)(config, num_positions, torch.float32)
