"""Inferring the configuration of a research checkpoint from names and shapes of its tensors."""

from __future__ import annotations

from itertools import compress
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from vllm_armt.checkpoints.names import system_of
from vllm_armt.config import BACKBONES, Refused


def infer_fields(tensors: dict[str, Tensor], base: PretrainedConfig) -> dict[str, Any]:
    """The system, and the fields of its configuration that follow from shapes.

    Args:
        tensors: by our names.
        base: configuration of the base model.

    Returns:
        `system` and `num_mem_tokens`; `wrap_pos` where the base model has learned positions; for an ARMT
        `wrap_layers`, `d_mem`, `gating`, `use_sink` and, unless gated, `n_heads`.

    Raises:
        Refused: a part of the memory is missing, or a shape fits no wrapper around this base model.
    """
    system = system_of(tensors)
    layers = [f"model.{BACKBONES[base.model_type].layers}.{i}" for i in range(base.num_hidden_layers)]
    if system == "prmt":
        _, m, _ = _shape(tensors, f"{layers[0]}.memory", "[1, m, d]")
    else:
        m, _ = _shape(tensors, "memory", "[m, d]")
    projections = _projections(tensors, layers) if system == "armt" else {}
    # an RMT and a PRMT have the memory tokens on both sides of a segment
    sides = 1 if system == "armt" else 2
    return {"system": system, "num_mem_tokens": m} | projections | _positions(tensors, base, sides * m)


def _projections(tensors: dict[str, Tensor], layers: list[str]) -> dict[str, Any]:
    """Which layers have a memory, and its sizes in the first of them."""
    wrapped = [any(name.startswith(f"{layer}.W_m") for name in tensors) for layer in layers]
    layer = next(compress(layers, wrapped), layers[0])
    p, _ = _shape(tensors, f"{layer}.W_mq.weight", "[p, d]")
    betas, d = _shape(tensors, f"{layer}.W_mb.weight", "[beta, d]")
    # one beta a channel is gating, which leaves the number of heads open
    heads = {"gating": True} if betas == d else {"gating": False, "n_heads": betas}
    return {"wrap_layers": wrapped, "d_mem": p, "use_sink": "sink" in tensors} | heads


def _positions(tensors: dict[str, Tensor], base: PretrainedConfig, extra: int) -> dict[str, Any]:
    """Whether the base model's table of learned positions has `extra` rows for the memory tokens."""
    positions = BACKBONES[base.model_type].positions
    if positions is None:
        return {}
    name = f"model.{positions}.weight"
    rows, _ = _shape(tensors, name, "[positions, d]")
    plain = base.max_position_embeddings
    wrapped = plain + extra
    if rows not in (plain, wrapped):
        raise Refused(
            f"Tensor {name!r} has {rows} rows; by the base model's config it must be {plain}, or {wrapped} where the "
            "memory tokens have positions of their own (`wrap_pos`)."
        )
    return {"wrap_pos": rows == wrapped}


def _shape(tensors: dict[str, Tensor], name: str, expected: str) -> tuple[int, ...]:
    if name not in tensors:
        raise Refused(f"Missing tensor {name!r}: the checkpoint has no such part.")
    shape = tuple(tensors[name].shape)
    if len(shape) != expected.count(",") + 1:
        raise Refused(f"Tensor {name!r} has shape {list(shape)}; it must be {expected}.")
    return shape
