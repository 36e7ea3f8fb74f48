"""What a backend of attention does, and which one is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_armt.attention.window import Past, Window
from vllm_armt.core import SegmentLayout
from vllm_armt.core.pages import LayerPages
from vllm_armt.integration.options import ATTENTIONS
from vllm_armt.plan.tails import TailRows

# below vLLM's own logger, so that its handlers and level apply
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class AttentionShape:
    """What a backend has to attend.

    Attributes:
        dtype: of queries, keys and values.
        head_dim: of a head, on which the scale of scores depends: `head_dim ** -0.5`.
        layout: the rows of a segment.
        columns: keys of a page.
        window: how a segment sees the one before; None if it does not.
    """

    dtype: torch.dtype
    head_dim: int
    layout: SegmentLayout
    columns: int
    window: Window | None = None


class Attention(Protocol):
    """A backend. All scores are scaled by `head_dim ** -0.5`; kv_heads divides heads.

    Attributes:
        name: among the options.
    """

    name: ClassVar[str]

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        """Causal attention within each cell, and to the keys of the segment before if there is a window.

        Args:
            q: `[R, heads, head_dim]`, cells of `cell_rows` rows one behind another.
            k, v: `[R, kv_heads, head_dim]`.
            cell_rows: T.
            past: of the cells, with a window.

        Returns:
            `[R, heads * head_dim]`.
        """
        ...

    def build_metadata(self, rows: TailRows) -> Any:
        """What `open_rows` needs to know of a step's open pieces, on the device; made once a step."""
        ...

    def attend_tails(self, metadata: Any, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of open pieces to the earlier keys of their segments and causally to themselves.

        Keys and values of segments that stay open are left in their pages, and those that a window needs.

        Args:
            metadata: of the step.
            pages: of this layer; None where pages do not exist yet and no piece has a past.
            q: `[rows, heads, head_dim]`, local rows.
            k, v: `[rows, kv_heads, head_dim]`.

        Returns:
            `[rows, heads * head_dim]`.
        """
        ...


def choose_attention(name: str, device: torch.device, shape: AttentionShape) -> Attention:
    """The backend of that name; "auto" is the fastest that the device and the shape allow.

    Raises:
        ValueError: the named backend cannot run here.
    """
    # backends import what not every machine has
    from vllm_armt.attention.flash_attn import FlashAttention
    from vllm_armt.attention.sdpa import SDPAttention
    from vllm_armt.attention.vllm_cpu import VllmCPUAttention
    from vllm_armt.attention.xformers import XformersAttention

    in_order: list[type[SDPAttention] | type[VllmCPUAttention] | type[FlashAttention]]
    in_order = [VllmCPUAttention, FlashAttention, XformersAttention, SDPAttention]
    backends = {backend.name: backend for backend in in_order}
    assert set(backends) == set(ATTENTIONS) - {"auto"}
    reasons = {key: backend.why_not(device, shape) for key, backend in backends.items()}
    chosen = next(key for key, why_not in reasons.items() if not why_not) if name == "auto" else name
    if reasons[chosen]:
        usable = ", ".join(repr(key) for key in ("auto", *backends) if not reasons.get(key))
        raise ValueError(
            f'additional_config["armt"]["attention"] is {name!r}, which can\'t be used here: {reasons[chosen]}. '
            f"Usable here: {usable}."
        )
    refused = "; ".join(f"{key}: {reason}" for key, reason in reasons.items() if reason)
    logger.info("Attention: %s%s.", chosen, f" ({refused})" if refused else "")
    return backends[chosen](device, shape)
