"""The memories M and z of ARMT in a wave, one per lane and layer of a block.

A write of a few rows would cost a pass over the whole of M, so writes are collected and M takes several of
them at a time. Until then they are read beside it: `q (M + k^T r) = q M + (q k^T) r`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vllm_armt.core.memory import MemoryRule
from vllm_armt.core.pages import LayerPages
from vllm_armt.linear.choose import gemm_dtype
from vllm_armt.linear.rows import Rows
from vllm_armt.plan.step import Group, Wave
from vllm_armt.plan.wave import WaveMetadata
from vllm_armt.recurrence.armt_projections import MemoryProjections

COLLECTED_ROWS = 32
"""Rows that M takes at a time; measured on CPUs, where more make reading as slow as they make writing fast."""


@dataclass(frozen=True)
class Run:
    """Cells of a group whose memories are neighbours, as views of the lanes.

    The h heads of a memory are memories of their own here, in the batch dimension.

    Attributes:
        cells: which of the group's cells, n of them.
        M: `[n * h, K/h, d/h]` and z: `[n * h, K/h]`, float32.
        read_M: like M, as it is read, in the dtype in which the rows multiply.
        k, r: `[n * h, collected, K/h]` and `[n * h, collected, d/h]`, float32, the writes that M is still to
            take; the first `collected` rows are in use.
        read_k, read_r: the same in the dtype of `read_M`.
    """

    cells: slice
    M: Tensor
    z: Tensor
    read_M: Tensor
    k: Tensor
    r: Tensor
    read_k: Tensor
    read_r: Tensor
    collected: int

    def read(self, rule: MemoryRule, q: Tensor, x: Tensor) -> None:
        """Add to rows x `[n, T, d]` what their features q `[n, T, K]` read."""
        dtype = self.read_M.dtype
        weights = rule.weights(_by_head(rule, q).to(dtype), self.z)
        # of one head, the rows themselves
        A = x if rule.heads == 1 and x.dtype == dtype else torch.zeros_like(_by_head(rule, x), dtype=dtype)
        A.baddbmm_(weights, self.read_M)
        if self.collected:
            k, r = self.read_k[:, : self.collected], self.read_r[:, : self.collected]
            A.baddbmm_(weights @ k.transpose(1, 2), r)
        if A is not x:
            x += rule.merge_heads(A.unflatten(0, (-1, rule.heads)))

    def write(self, rule: MemoryRule, k: Tensor, v: Tensor, beta: Tensor, first: Tensor) -> None:
        """Collect the writes of the cells' memory tokens; M takes them once there is no room for more.

        Args:
            rule: of the memory.
            k, v, beta: `[n, m, K]`, `[n, m, d]`, `[n, m, h]` or, gated, `[n, m, d]`.
            first: bool `[n]`, whether it is its document's very first segment.
        """
        k, v, beta = (_by_head(rule, x) for x in (k, v, beta))
        used, end = self.collected, self.collected + k.shape[1]
        read_k = k.to(self.read_k.dtype)
        prev = read_k @ self.read_M
        if used:
            prev.baddbmm_(read_k @ self.read_k[:, :used].transpose(1, 2), self.read_r[:, :used])
        residual, dz = rule.update(k, v, beta, prev, self.z, first.unsqueeze(1).expand(-1, rule.heads).flatten())
        self.z.add_(dz)
        if used == 0 and end == self.k.shape[1]:
            self.M.baddbmm_(k.transpose(1, 2), residual)
        else:
            for target, source in ((self.k, k), (self.r, residual), (self.read_k, k), (self.read_r, residual)):
                target[:, used:end] = source
            if end < self.k.shape[1]:
                return
            self.M.baddbmm_(self.k.transpose(1, 2), self.r)
        if self.read_M is not self.M:
            self.read_M.copy_(self.M)


def _by_head(rule: MemoryRule, x: Tensor) -> Tensor:
    """`[n, T, c] -> [n * h, T, c/h]`."""
    return rule.split_heads(x).flatten(0, 1)


class Lanes:
    """Working buffers of a wave; a block's layer l is at index l % depth.

    Attributes:
        M: `[depth, width, h, K/h, d/h]` and z: `[depth, width, h, K/h]`, float32.
    """

    def __init__(
        self, wave: Wave, heads: int, K: int, d: int, m: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Buffers in which nothing is yet; `dtype` is that in which rows that read multiply."""
        self.depth, self.width = wave.depth, wave.width
        shape, K, d = (wave.depth, wave.width, heads), K // heads, d // heads
        self.m = m
        self.writes = max(1, COLLECTED_ROWS // m)
        """How many writes M takes at a time."""
        rows = self.writes * m
        self.M = torch.empty(*shape, K, d, dtype=torch.float32, device=device)
        self.z = torch.empty(*shape, K, dtype=torch.float32, device=device)
        # what no document has collected is read as zeros, and never as what an empty buffer may hold
        self.k = torch.zeros(*shape, rows, K, dtype=torch.float32, device=device)
        self.r = torch.zeros(*shape, rows, d, dtype=torch.float32, device=device)
        same = dtype == torch.float32
        self.read_M = self.M if same else torch.empty_like(self.M, dtype=dtype)
        self.read_k = self.k if same else self.k.to(dtype)
        self.read_r = self.r if same else self.r.to(dtype)

    def collected(self, group: Group) -> int:
        """Rows that are collected when a group begins: one write a diagonal, the same for all its layers."""
        diagonal = group.last_position + group.first_layer % self.depth
        return diagonal % self.writes * self.m

    def enter(self, inner: int, lanes: Tensor, M: Tensor | None, z: Tensor | None) -> None:
        """Give lanes `[n]` of one layer the memory that their next documents start with; None is the empty one."""
        for buffer, value in ((self.M, M), (self.z, z)):
            if value is None:
                buffer[inner].index_fill_(0, lanes, 0.0)
            else:
                buffer[inner].index_copy_(0, lanes, value.float())
        if self.read_M is not self.M:
            self.read_M[inner].index_copy_(0, lanes, self.M[inner][lanes].to(self.read_M.dtype))
        self.k[inner].index_fill_(0, lanes, 0.0)
        if self.read_k is not self.k:
            self.read_k[inner].index_fill_(0, lanes, 0.0)

    def memory(self, inner: int, lanes: Tensor, collected: int) -> tuple[Tensor, Tensor]:
        """M `[n, h, K/h, d/h]` and z `[n, h, K/h]` of lanes of one layer, with what is collected."""
        k, r = self.k[inner][lanes, :, :collected], self.r[inner][lanes, :, :collected]
        return self.M[inner][lanes] + k.mT @ r, self.z[inner][lanes]

    def runs(self, group: Group) -> list[Run]:
        """The group's memories: all layers at once while every lane is in use, else layer by layer."""
        inner = group.first_layer % self.depth
        if all(count == self.width for count in group.lanes):
            return [self._run(group, 0, slice(inner, inner + len(group.lanes)), self.width)]
        begins = accumulate(group.lanes, initial=0)
        layers = enumerate(zip(begins, group.lanes, strict=False), inner)
        return [self._run(group, begin, slice(i, i + 1), count) for i, (begin, count) in layers]

    def _run(self, group: Group, begin: int, layers: slice, lanes: int) -> Run:
        """The group's cells from `begin` on, which lie in the first `lanes` of some layers: all of them, or of one."""

        def view(buffer: Tensor) -> Tensor:
            return buffer[layers, :lanes].flatten(0, 2)

        M, k, r = view(self.M), view(self.k), view(self.r)
        return Run(
            slice(begin, begin + (layers.stop - layers.start) * lanes),
            M,
            view(self.z),
            M if self.read_M is self.M else view(self.read_M),
            k,
            r,
            k if self.read_k is self.k else view(self.read_k),
            r if self.read_r is self.r else view(self.read_r),
            self.collected(group),
        )


class ARMTWaveState:
    """The memories of a wave."""

    def __init__(
        self,
        projections: MemoryProjections,
        m: int,
        metadata: WaveMetadata,
        pages: Sequence[LayerPages] | None,
        cells: Tensor,
    ) -> None:
        self.projections, self.rule = projections, projections.rule
        self.metadata = metadata
        self.pages = pages
        self.m = m
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
        if group.last_position == 0 and not self.metadata.entries[0].resumed.numel():
            # all memories are empty still
            return
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
