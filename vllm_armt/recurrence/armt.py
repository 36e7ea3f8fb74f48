"""The associative memory of every layer: all rows read it, a segment's memory tokens write it (ARMT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.choose import gemm_dtype
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence.armt_projections import MemoryProjections
from vllm_armt.recurrence.armt_reads import Closings, Reads, build_closings, build_reads
from vllm_armt.recurrence.armt_reads_gather import GatheredRows
from vllm_armt.recurrence.armt_wave import ARMTWaveState


@dataclass(frozen=True)
class TailMemories:
    """What the tails of a step read and write.

    Attributes:
        reads: by width.
        closings: segments that end here; none in most steps.
        gathered: where single rows find those of M in the pool; None where a kernel reads them, or no row does.
    """

    reads: list[Reads]
    closings: list[Closings]
    gathered: GatheredRows | None = None


class ARMTRecurrence(nn.Module):
    """The recurrence of ARMT; pages hold `M` `[h, K/h, d/h]` and `z` `[h, K/h]`."""

    flow = Flow.SAME_LAYER

    def __init__(self, projections: MemoryProjections, rows_around: nn.Parameter, m: int) -> None:
        """Make the recurrence of a model.

        Args:
            projections: of all layers.
            rows_around: `[prefix + m, d]`, the sink if there is one, and the memory tokens.
            m: memory tokens.
        """
        super().__init__()
        self.projections = projections
        self.rows_around = rows_around
        self.rule = projections.rule
        self.m = m

    def wave_state(self, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor) -> ARMTWaveState:
        return ARMTWaveState(self.projections, self.m, metadata, pages, cells)

    def build_metadata(self, rows: TailRows, pages: LayerPages | None) -> TailMemories:
        reads = build_reads(rows)
        gathered = None
        if reads and reads[0].width == 1 and not has_row_kernel(rows.device):
            assert pages is not None
            gathered = GatheredRows.of(reads[0].pages, pages.state["M"])
        return TailMemories(reads, build_closings(rows), gathered)

    def before_tails(self, metadata: TailMemories, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        if not metadata.reads:
            return
        assert pages is not None
        state = pages[layer].state
        u = self.projections.query_inputs(h, Rows(layer, (h.shape[0],)))
        for reads in metadata.reads:
            if reads.width > 1:
                self._add_reads(reads, u, state, h)
            elif has_row_kernel(h.device):
                # Triton comes with GPUs
                from vllm_armt.recurrence import armt_reads_triton

                armt_reads_triton.add_reads(self.rule, reads, u, state, h)
            else:
                assert metadata.gathered is not None
                metadata.gathered.add_reads(self.rule, reads, u, state, h)

    def after_tails(self, metadata: TailMemories, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        """Turn the pages of ending segments from keys into the memory after them."""
        for closings in metadata.closings:
            assert pages is not None
            self._write(closings, layer, pages[layer].state, h)

    def _write(self, closings: Closings, layer: int, state: Mapping[str, Tensor], h: Tensor) -> None:
        rule = self.rule
        tails, m = closings.rows.shape
        written = self.projections.writes(h[closings.rows.flatten()], Rows(layer, (tails * m,)))
        k, v, beta = (rule.split_heads(t.view(tails, m, -1)) for t in written)
        M, z = (x.float() for x in _memories(state, closings.read_pages))
        first: Tensor | bool = False
        if closings.first is not None:
            first = closings.first.unsqueeze(1).expand(-1, rule.heads)
            M.masked_fill_(first[..., None, None], 0.0)
            z.masked_fill_(first[..., None], 0.0)
        residual, dz = rule.update(k, v, beta, k @ M, z, first)
        # M + k^T residual, of every head, in one pass over M
        M.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, residual.flatten(0, 1))
        state["M"][closings.pages] = M.to(state["M"].dtype)
        state["z"][closings.pages] = z.add_(dz).to(state["z"].dtype)

    def _add_reads(self, reads: Reads, u: Tensor, state: Mapping[str, Tensor], h: Tensor) -> None:
        """Add to tails of several rows what they find in copies of M."""
        M, z = _memories(state, reads.pages)
        dtype = gemm_dtype(u.dtype, u.device)
        q = self.rule.split_heads(self.rule.phi(reads.gather(u))).to(dtype)
        reads.add(h, self.rule.merge_heads(self.rule.read(q, M.to(dtype), z)).to(h.dtype))


def _memories(state: Mapping[str, Tensor], pages: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of M `[n, h, K/h, d/h]` and z `[n, h, K/h]` of some pages `[n]`."""
    # on CPUs `state["M"][pages]` takes two to seven times as long
    return state["M"].index_select(0, pages), state["z"].index_select(0, pages)


def has_row_kernel(device: torch.device) -> bool:
    """Whether single rows read memories by a kernel of ours there."""
    return device.type == "cuda"
