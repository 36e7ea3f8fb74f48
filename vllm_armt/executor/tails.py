"""Tails: rows of open segments (decoded tokens and the ends of prompts), layer by layer over all requests.

Their keys and values go to the segment's page. A row that ends its segment brings the memory tokens
along, which vLLM never sees; they write the memory, and the page turns from keys into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm_armt.attention import LayerAttention
from vllm_armt.attention.window import move_closed
from vllm_armt.core.pages import LayerPages
from vllm_armt.executor.parts import ModelParts
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.tails import TailRows, ranges
from vllm_armt.plan.upload import upload
from vllm_armt.recurrence import Recurrence

R = TypeVar("R")
"""What the recurrence knows of a step's tails."""


@dataclass(frozen=True)
class TailMetadata(Generic[R]):
    """The tails of a step on the device, built once a step and used at every layer.

    Attributes:
        tokens: int64 `[rows]`, for each row its row in the prefix's and suffix's embeddings followed by the input.
        out_local, out_rows: int64 `[tokens]`, the rows that are tokens, and their rows in the step's input.
        positions: int64 `[rows]`.
        attention, recurrence: what the backends of attention and the recurrence need to know.
        moved: `[n]`, pages of segments that close here, whose keys move; None if there is none.
    """

    tokens: Tensor
    out_local: Tensor
    out_rows: Tensor
    positions: Tensor
    attention: list[Any]
    recurrence: R
    moved: Tensor | None = None

    @classmethod
    def build(
        cls,
        rows: TailRows,
        attention: LayerAttention,
        recurrence: Recurrence[R],
        pages: LayerPages | None,
        moves_keys: bool = False,
    ) -> TailMetadata[R]:
        """Upload the rows of a step's tails.

        Args:
            rows: of the tails.
            attention, recurrence: of the model.
            pages: those of any layer; None where there are none.
            moves_keys: whether the keys of closed segments move.
        """
        layout = rows.layout
        around = layout.prefix + layout.suffix
        tokens, out_local, out_rows, positions = upload(
            [
                rows.numbered(0, around + rows.inputs, layout.prefix),
                rows.token_rows,
                ranges(rows.inputs, rows.tokens),
                rows.positions,
            ],
            rows.device,
        )
        seen, flowing = attention.build_metadata(rows), recurrence.build_metadata(rows, pages)
        closed = np.flatnonzero(rows.closes)
        moved = rows.pages(closed) if moves_keys and pages is not None and len(closed) else None
        return cls(tokens, out_local, out_rows, positions, seen, flowing, moved)


def run_tails(parts: ModelParts, metadata: TailMetadata[Any], inputs: Tensor, outputs: Tensor) -> None:
    """Run all layers over the tails of a step.

    Args:
        parts: the model.
        metadata: the tails.
        inputs: embeddings of the step's tokens, `[tokens, d]`.
        outputs: `[tokens, d]`; the rows of their tokens are filled with the last layer's outputs.
    """
    h = torch.cat([parts.recurrence.rows_around.to(inputs.dtype), inputs])[metadata.tokens]
    if parts.positions is not None:
        h += parts.positions(metadata.positions)
    for layer in range(parts.layers.num_layers):
        rows = Rows(layer, (h.shape[0],))
        parts.recurrence.before_tails(metadata.recurrence, layer, parts.pages, h)
        q, k, v = parts.layers.project(h, rows, metadata.positions)
        pages = None if parts.pages is None else parts.pages[layer]
        o = parts.attention.attend_tails(metadata.attention, layer, pages, q, k, v)
        if metadata.moved is not None:
            assert parts.move is not None
            assert pages is not None
            move_closed(parts.move, parts.layout, pages, metadata.moved)
        parts.layers.complete(h, o, rows)
        parts.recurrence.after_tails(metadata.recurrence, layer, parts.pages, h)
    outputs[metadata.out_rows] = h[metadata.out_local]
