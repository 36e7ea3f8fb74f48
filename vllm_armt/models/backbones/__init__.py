"""Backbones as grouped decoder layers; each file states one architecture."""

from __future__ import annotations

from pkgutil import resolve_name

from transformers import PretrainedConfig

from vllm_armt.config import BACKBONES
from vllm_armt.models.backbones.decoder import DecoderLayers


def layers_class(config: PretrainedConfig) -> type[DecoderLayers]:
    """The class that runs the decoder layers of a base model.

    Args:
        config: the base model's; its `model_type` must be supported.
    """
    return resolve_name(f"{__name__}.{BACKBONES[config.model_type].implementation}")
