"""Configurations: one file a family of systems, and the table of backbones."""

from vllm_armt.config.armt import ARMTConfig, ARMTSWConfig
from vllm_armt.config.backbones import BACKBONES, Backbone, supported_backbones
from vllm_armt.config.base import RecurrentConfig
from vllm_armt.config.refused import Refused
from vllm_armt.config.rmt import PRMTConfig, RMTConfig

CONFIGS: tuple[type[RecurrentConfig], ...] = (ARMTConfig, ARMTSWConfig, PRMTConfig, RMTConfig)
"""Of every system; each one's `model_type` is its name."""

__all__ = [
    "BACKBONES",
    "CONFIGS",
    "ARMTConfig",
    "ARMTSWConfig",
    "Backbone",
    "PRMTConfig",
    "RMTConfig",
    "RecurrentConfig",
    "Refused",
    "supported_backbones",
]
