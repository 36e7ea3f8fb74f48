"""Attention by the paged kernel of vLLM's CPU backend (vllm/v1/attention/backends/cpu_attn.py).

It reads keys and values where they lie, packed as its instruction set likes them, so tails gather
nothing; cells use scratch pages of one segment each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.paged import Paged
from vllm_armt.attention.window import Past
from vllm_armt.core.pages import COLUMN_ALIGNMENT, LayerPages
from vllm_armt.plan.tails import TailRows


@dataclass(frozen=True)
class Scheduled:
    """Sequences, and how the kernel shares the work out over threads."""

    paged: Paged
    scheduler_metadata: Tensor


class VllmCPUAttention:
    """The backend `vllm_cpu`."""

    name: ClassVar[str] = "vllm_cpu"

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        self.shape = shape
        self.columns = shape.columns
        self.isa = _get_attn_isa(shape.dtype, COLUMN_ALIGNMENT, shape.head_dim)
        self.scale = shape.head_dim**-0.5
        # of the kernel -1 is none
        self.reach = -1 if shape.reach is None else shape.reach
        self._scratch = torch.empty(0)
        self._cells: dict[int, Scheduled] = {}

    @staticmethod
    def why_not(device: torch.device, shape: AttentionShape) -> str:
        """Why it can't be used; empty if it can."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if shape.beyond_causal:
            return f"the mask of vLLM's kernel is causal, without {shape.beyond_causal}"
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        return "" if shape.head_dim in sizes else f"vLLM's kernel takes heads of {sizes}, not of {shape.head_dim}"

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        count = q.shape[0] // cell_rows
        if count not in self._cells:
            self._cells[count] = self._cells_metadata(count, cell_rows)
        return self._attend(self._cells[count], *self._scratch_pages(count, k), q, k, v)

    def build_metadata(self, rows: TailRows) -> Scheduled:
        return self._scheduled(Paged.of(rows, self.columns))

    def attend_tails(self, metadata: Scheduled, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if pages is None:
            return self._attend(metadata, *self._scratch_pages(metadata.paged.table.numel(), k), q, k, v)
        if metadata.paged.cleared is not None:
            # the kernel multiplies masked columns by zero, and what lies there may be read as NaN
            pages.k[metadata.paged.cleared] = 0
            pages.v[metadata.paged.cleared] = 0
        return self._attend(metadata, pages.k, pages.v, q, k, v)

    def _attend(self, metadata: Scheduled, k_pages: Tensor, v_pages: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = metadata.paged
        ops.cpu_attn_reshape_and_cache(k, v, k_pages, v_pages, paged.slots, self.isa)
        o = q.new_empty(q.shape)
        ops.cpu_attention_with_kv_cache(
            q, k_pages, v_pages, o, paged.starts, paged.lengths, self.scale, True, None, self.reach, paged.table, 0.0,
            metadata.scheduler_metadata, None,
        )  # fmt: skip
        return o.flatten(1)

    def _cells_metadata(self, count: int, cell_rows: int) -> Scheduled:
        table = torch.arange(count, dtype=torch.int32)
        slots = (table.unsqueeze(1) * self.columns + torch.arange(cell_rows)).flatten().long()
        starts = torch.arange(0, (count + 1) * cell_rows, cell_rows, dtype=torch.int32)
        lengths = torch.full((count,), cell_rows, dtype=torch.int32)
        return self._scheduled(Paged(slots, starts, lengths, table.unsqueeze(1), None))

    def _scheduled(self, paged: Paged) -> Scheduled:
        shape = self.shape
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            len(paged.lengths),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            paged.lengths,
            shape.dtype,
            paged.starts,
            True,
            self.reach,
            self.isa,
            True,
        )
        return Scheduled(paged, scheduler_metadata)

    def _scratch_pages(self, count: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `count` scratch pages; columns that no cell fills are zero for good."""
        if len(self._scratch) < 2 * count:
            self._scratch = k.new_zeros(2 * count, k.shape[1], self.columns, k.shape[2])
        return self._scratch[:count], self._scratch[count : 2 * count]
