"""The associative memory of every layer: all rows read it, a segment's memory tokens write it (ARMT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.choose import gemm_dtype
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Flow, Group
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence import row_bags
from vllm_armt.recurrence.armt_reads import Closings, Reads, build_closings, build_reads
from vllm_armt.recurrence.armt_wave import Lanes, Run
from vllm_armt.recurrence.projections import StackedMemory


@dataclass
class TailMemories:
    """What the open pieces of a step read and write.

    Attributes:
        reads: by width.
        closings: segments that end here; none in most steps.
        bags: where single rows find those of M in the pool, where no kernel reads them; made at the first layer.
    """

    reads: list[Reads]
    closings: list[Closings]
    bags: row_bags.Bags | None = None


class ARMTRecurrence(nn.Module):
    """The recurrence of ARMT; pages hold `M` `[h, K/h, d/h]` and `z` `[h, K/h]`."""

    flow = Flow.SAME_LAYER

    def __init__(self, projections: StackedMemory, rows_around: nn.Parameter, m: int) -> None:
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

    def states(self, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor) -> ARMTWaveState:
        return ARMTWaveState(self, metadata, pages, cells)

    def build_metadata(self, rows: TailRows) -> TailMemories:
        return TailMemories(build_reads(rows), build_closings(rows))

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
                from vllm_armt.recurrence import armt_reads_triton as row_kernel

                row_kernel.add_reads(self.rule, reads, u, state, h)
            else:
                if layer == 0:
                    metadata.bags = row_bags.Bags.of(reads.pages, state["M"])
                assert metadata.bags is not None
                row_bags.add_reads(self.rule, reads, metadata.bags, u, state, h)

    def after_tails(self, metadata: TailMemories, layer: int, pages: Sequence[LayerPages] | None, h: Tensor) -> None:
        """Turn the pages of ending segments from keys into the memory after them."""
        for closings in metadata.closings:
            assert pages is not None
            self._write(closings, layer, pages[layer].state, h)

    def _write(self, closings: Closings, layer: int, state: Mapping[str, Tensor], h: Tensor) -> None:
        rule = self.rule
        pieces, m = closings.rows.shape
        written = self.projections.writes(h[closings.rows.flatten()], Rows(layer, (pieces * m,)))
        k, v, beta = (rule.split_heads(t.view(pieces, m, -1)) for t in written)
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
        """Add to pieces of several rows what they find in copies of M."""
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


class ARMTWaveState:
    """The memories of a wave."""

    def __init__(
        self, recurrence: ARMTRecurrence, metadata: WaveMetadata, pages: Sequence[LayerPages] | None, cells: Tensor
    ) -> None:
        self.projections, self.rule = recurrence.projections, recurrence.rule
        self.metadata = metadata
        self.pages = pages
        self.m = recurrence.m
        self.lanes = Lanes(
            metadata.wave,
            self.rule.heads,
            self.projections.feature_size,
            cells.shape[2],
            self.m,
            gemm_dtype(cells.dtype, cells.device),
            cells.device,
        )
        self._runs: list[Run] = []

    def before(self, group: Group, rows: Rows, cells: Tensor) -> None:
        for layer, inner, position in self.metadata.layers_of(group):
            self._enter(layer, inner, position)
        self._runs = self.lanes.runs(group)
        q = self.projections.queries(cells.view(-1, cells.shape[2]), rows)
        q = q.view(*cells.shape[:2], self.projections.feature_size)
        for run in self._runs:
            run.read(self.rule, q[run.cells], cells[run.cells])

    def after(self, group: Group, cells: Tensor) -> None:
        outputs = cells[:, -self.m :].reshape(-1, cells.shape[2])
        written = self.projections.writes(outputs, self.metadata.rows_of(group, self.m))
        k, v, beta = (t.view(-1, self.m, t.shape[-1]) for t in written)
        begin, end = self.metadata.wave.span(group)
        first = self.metadata.first[begin:end]
        for run in self._runs:
            run.write(self.rule, k[run.cells], v[run.cells], beta[run.cells], first[run.cells])
        collected = (self.lanes.collected(group) + self.m) % (self.lanes.writes * self.m)
        for layer, inner, q in self.metadata.layers_of(group):
            self._keep(layer, inner, q, collected)

    def _enter(self, layer: int, inner: int, q: int) -> None:
        """Give the lanes of documents that start at position q the memory that they start with."""
        if (entry := self.metadata.entries.get(q)) is None:
            return
        self.lanes.enter(inner, entry.empty, None, None)
        if entry.resumed.numel():
            assert self.pages is not None
            state = self.pages[layer].state
            self.lanes.enter(inner, entry.resumed, state["M"][entry.pages], state["z"][entry.pages])

    def _keep(self, layer: int, inner: int, q: int, collected: int) -> None:
        """Write the memories after retained segments to their pages."""
        if (retained := self.metadata.snapshots.get(q)) is None:
            return
        assert self.pages is not None
        state = self.pages[layer].state
        M, z = self.lanes.memory(inner, retained.lanes, collected)
        state["M"][retained.pages] = M.to(state["M"].dtype)
        state["z"][retained.pages] = z.to(state["z"].dtype)
