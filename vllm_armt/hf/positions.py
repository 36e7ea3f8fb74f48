"""Learned position embeddings of a base model, and those that `wrap_pos` adds for memory tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from vllm_armt.config import RecurrentConfig


def widen_positions(base: PreTrainedModel, config: RecurrentConfig) -> None:
    """Add `config.extra_positions` rows: the prefix' before the base model's P, the suffix' after them."""
    name = config.backbone.positions
    old = base.get_submodule(name).weight.detach()
    wide = nn.Embedding(len(old) + config.extra_positions, old.shape[1], device=old.device, dtype=old.dtype)
    base.set_submodule(name, wide)
    _parts(base, config)[1].data.copy_(old)


def draw_positions(base: PreTrainedModel, config: RecurrentConfig) -> None:
    """Draw the added rows at the scale of the base model's own."""
    prefix, old, suffix = _parts(base, config)
    for new in (prefix, suffix):
        init.normal_(new.data, std=old.float().std().item())


def check_positions(positions: list[int], config: RecurrentConfig) -> None:
    """Refuse rows whose position the base model has not learned.

    Args:
        positions: of the prefix and the tokens, and of a suffix that has none of its own.

    Raises:
        ValueError: one lies beyond the base model's.
    """
    if config.backbone.positions is None:
        return
    learned = config.base_model_config.max_position_embeddings
    needed = max(positions, default=0) + 1 - (config.prefix_rows if config.wrap_pos else 0)
    if needed > learned:
        raise ValueError(
            f"The text needs {needed} learned positions, but the base model has {learned}: give it fewer tokens"
            + (", or close the open segment (`close_segment`)." if config.learned_positions == "restart" else ".")
        )


def _parts(base: PreTrainedModel, config: RecurrentConfig) -> tuple[Tensor, ...]:
    """The rows of the prefix, of the base model and of the suffix: views."""
    first, learned = config.prefix_rows, config.base_model_config.max_position_embeddings
    return torch.tensor_split(base.get_submodule(config.backbone.positions).weight, (first, first + learned))
