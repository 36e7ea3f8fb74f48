"""Weights that come again, while a server runs: from disk, or from a trainer."""

from __future__ import annotations

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


def end_layerwise_reload(model: nn.Module, model_config: ModelConfig) -> None:
    """Give a model its parameters back, if vLLM has taken them away to reload it layer by layer.

    vLLM does so before `load_weights` of `reload_weights` and of weight transfer
    (vllm/model_executor/model_loader/reload/layerwise.py): parameters are `meta` tensors until all that belongs into a
    module has come, and what of it does not come is left uninitialised. A module of ours holds all L layers: nearly the
    whole model would wait in buffers, and a few tensors would cost all others. So ours are loaded in place.
    """
    infos = [get_layerwise_info(module) for module in model.modules()]
    if not any(info.can_load() for info in infos):
        return
    for info in infos:
        if info.can_load():
            # nothing is to come by this way; vLLM would warn of every module
            info.load_numel_total = 0
    finalize_layerwise_reload(model, model_config)
