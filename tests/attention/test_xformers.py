"""The `xformers` backend as far as CPUs can tell: its mask is what our cells see, and its call is put together right.

Its kernels need a GPU; here they are replaced by attention written out under the mask that they are given.
"""

from __future__ import annotations

import platform
import sys

import pytest
import torch
from torch import Tensor

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("xformers is built for Linux on x86-64 alone", allow_module_level=True)

import xformers.ops
from xformers.ops.fmha import Inputs
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

from tests.support.softmax import attend_each
from vllm_armt.attention import Attention, AttentionShape, choose_attention
from vllm_armt.attention.naive import attend
from vllm_armt.attention.xformers import XformersAttention, why_no_kernel
from vllm_armt.core import SegmentLayout
from vllm_armt.plan.step import Tail
from vllm_armt.plan.tails import TailRows

CPU = torch.device("cpu")
HEAD_DIM = 32
SHAPE = AttentionShape(torch.float32, 1, 1, HEAD_DIM, SegmentLayout(0, 6, 0), 32)


def visible(lengths: list[int]) -> Tensor:
    """Which keys the rows of such sequences see under xformers' mask: bool `[R, R]`."""
    mask = BlockDiagonalCausalMask.from_seqlens(lengths, device=CPU)
    return mask.materialize((sum(lengths), sum(lengths))) == 0


def probe(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one head whose attended values are its weights: value i is 1 at i alone."""
    assert rows <= HEAD_DIM
    q, k = torch.randn(2, rows, 1, HEAD_DIM)
    return q, k, torch.eye(rows, HEAD_DIM).unsqueeze(1)


@pytest.fixture(params=["sdpa", "vllm_cpu"])
def backend(request: pytest.FixtureRequest) -> Attention:
    torch.manual_seed(0)
    return choose_attention(request.param, CPU, SHAPE)


@pytest.mark.parametrize(("cells", "T"), [(1, 6), (3, 5), (5, 6), (4, 1)])
def test_cells_see_what_the_mask_shows(backend: Attention, cells: int, T: int):
    rows = cells * T
    weights = backend.attend_cells(*probe(rows), T)[:, :rows]
    assert torch.equal(weights > 0, visible([T] * cells))


@pytest.mark.parametrize("lengths", [[3, 1, 6], [1, 1, 2, 5], [6]])
def test_sequences_of_several_lengths_see_what_the_mask_shows(backend: Attention, lengths: list[int]):
    pieces = [Tail(i, 0, 0, length, sum(lengths[:i]), closes=False) for i, length in enumerate(lengths)]
    rows = TailRows(pieces, SHAPE.layout, None, CPU)
    weights = backend.attend_tails(backend.build_metadata(rows), None, *probe(len(rows)))[:, : len(rows)]
    assert torch.equal(weights > 0, visible(lengths))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_cells_are_one_call_with_shared_key_heads_in_groups(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    cells, T = 3, 5
    calls: list[tuple[int, ...]] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalCausalMask) -> Tensor:
        """`[1, R, (groups,) heads, head_dim]`, head by head, as xformers' documentation has it."""
        Inputs(q, k, v, attn_bias=attn_bias).validate_inputs()
        calls.append(tuple(q.shape))
        seen = attn_bias.materialize((q.shape[1], q.shape[1])) == 0
        q_rows, k_rows, v_rows = (x[0].flatten(1, -2) for x in (q, k, v))
        return attend(q_rows, k_rows, v_rows, seen).to(q.dtype).view(q.shape)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", memory_efficient_attention)
    q = torch.randn(cells * T, heads, HEAD_DIM)
    k, v = torch.randn(2, cells * T, kv_heads, HEAD_DIM)
    o = XformersAttention(CPU, SHAPE).attend_cells(q, k, v, T)
    torch.testing.assert_close(o.double(), attend_each(q, k, v, [T] * cells), rtol=1e-5, atol=1e-5)
    share = (heads,) if heads == kv_heads else (kv_heads, heads // kv_heads)
    assert calls == [(1, cells * T, *share, HEAD_DIM)]


def test_its_kernels_are_asked_whether_they_can_attend_the_cells():
    # on CPUs none can, and says so by itself
    assert "none of its kernels can attend these cells" in why_no_kernel(CPU, SHAPE)
