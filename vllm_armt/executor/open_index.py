"""The rows of open segments with their integers on the device, computed once a step and used at every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_armt.attention import Attention
from vllm_armt.core import Cell
from vllm_armt.plan.step import OpenPiece
from vllm_armt.plan.tails import LocalRows, ranges
from vllm_armt.plan.upload import upload
from vllm_armt.recurrence import System


@dataclass(frozen=True)
class OpenIndex:
    """The open pieces of a step.

    Attributes:
        tokens: `[local rows]`, rows of the prefix's and suffix's embeddings followed by the step's input.
        out_local, out_rows: local rows of real tokens, and their rows in the step's input.
        positions: `[local rows]`.
        attention, system: what the backend of attention and the system need to know.
    """

    tokens: Tensor
    out_local: Tensor
    out_rows: Tensor
    positions: Tensor
    attention: Any
    system: Any

    @classmethod
    def build(
        cls,
        pieces: Sequence[OpenPiece],
        cell: Cell,
        attention: Attention,
        system: System,
        block_table: Tensor | None,
        device: torch.device,
    ) -> OpenIndex:
        """Upload pieces; `block_table` is int32 `[requests, segments]`, or None where there are no pages."""
        rows = LocalRows(pieces, cell, block_table, device)
        around = cell.prefix + cell.suffix
        tokens, out_local, out_rows, positions = upload(
            [
                rows.numbered(0, around + rows.inputs, cell.prefix),
                rows.token_rows,
                ranges(rows.inputs, rows.tokens),
                rows.positions,
            ],
            device,
        )
        return cls(tokens, out_local, out_rows, positions, attention.index(rows), system.open_index(rows))
