"""Single rows read memories on a GPU: a Triton kernel from their projections to what is added to them.

It is `phi`, `weights` and the product with M of `vllm_armt/core/memory.py` in one launch. M is read once, where it
lies. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from vllm_armt.core.memory import EPS, NU, MemoryRule
from vllm_armt.recurrence.armt_reads import Reads

BLOCK_K, BLOCK_D = 64, 64
"""A program's tile of M: long enough in d that its rows are read in whole lines, and small enough that a single request
occupies many processors."""


def add_reads(rule: MemoryRule, reads: Reads, u: Tensor, state: Mapping[str, Tensor], h: Tensor) -> None:
    """Add to single rows what they find in the memories before their segments.

    Args:
        rule: of the memory.
        reads: of width 1.
        u: `W_mq h`, `[rows, p]`.
        state: of a layer's pages, with `M` `[pages, h, K/h, d/h]` and `z` `[pages, h, K/h]`.
        h: `[rows, d]`, changed in place.
    """
    M, z = state["M"], state["z"]
    _, heads, K, d = M.shape
    width = min(BLOCK_D, triton.next_power_of_2(d))
    grid = len(reads.pages), heads, triton.cdiv(d, width)
    _add_reads[grid](
        u, M, z, h, reads.pages, reads.rows,
        u.stride(0), M.stride(0), z.stride(0), h.stride(0),
        P=u.shape[1] // heads, K=K, D=d, NU=NU, EPS=EPS, NORMALIZE=rule.normalize, USE_DENOM=rule.use_denom,
        GATHERED=reads.rows is not None, BLOCK_K=BLOCK_K, BLOCK_D=width,
    )  # fmt: skip


@triton.jit
def _relu_of(u, i, mask, P: tl.constexpr):
    """Entries i of `[relu(u), relu(-u)]`."""
    x = tl.load(u + i % P, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(tl.where(i < P, x, -x), 0.0)


@triton.jit
def _features(u, k, mask, P: tl.constexpr, NU: tl.constexpr):
    """Entries k of phi before it is normalised: products of `[relu(u), relu(-u)]` and itself rolled by 1 to nu."""
    i = k % (2 * P)
    rolled = (i + NU * 2 * P - k // (2 * P) - 1) % (2 * P)
    return _relu_of(u, i, mask, P) * _relu_of(u, rolled, mask, P)


@triton.jit
def _add_reads(
    u, M, z, h, pages, rows, u_stride, M_stride, z_stride, h_stride,
    P: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NU: tl.constexpr, EPS: tl.constexpr,
    NORMALIZE: tl.constexpr, USE_DENOM: tl.constexpr, GATHERED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row, one head, and BLOCK_D columns of its M."""
    tail, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + tail) if GATHERED else tail
    # a pool has more elements than 32 bits count
    page = tl.load(pages + tail).to(tl.int64)
    u += row * u_stride + head * P
    M += page * M_stride + head * K * D
    z += page * z_stride + head * K
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    A = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_K,), tl.float32)
    found = tl.zeros((BLOCK_K,), tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        q = _features(u, k, k < K, P, NU)
        inside = (k < K)[:, None] & (columns < D)[None, :]
        A += q[:, None] * tl.load(M + k[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        square += q * q
        if USE_DENOM:
            found += q * tl.load(z + k, mask=k < K, other=0.0).to(tl.float32)
    read = tl.sum(A, 0)
    # phi is q / norm, so what it weighs is (q / norm) / (q.z / norm + eps)
    norm = tl.maximum(tl.sqrt(tl.sum(square, 0)), 1e-12) if NORMALIZE else 1.0
    read /= tl.sum(found, 0) + EPS * norm if USE_DENOM else norm
    out = h + row * h_stride + head * D + columns
    before = tl.load(out, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out, (before + read).to(h.dtype.element_ty), mask=columns < D)
