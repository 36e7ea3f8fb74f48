"""Gemma's norms in a dtype narrower than the one that they are computed in."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from vllm_armt.linear.rows import Rows
from vllm_armt.models.backbones.gemma import StackedGemmaNorm

L, SIZE, EPS = 3, 16, 1e-6


@pytest.mark.parametrize("rows", [Rows(1, (4,)), Rows(0, (4, 4, 4)), Rows(1, (2, 4))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layers_norm_is_that_of_transformers_within_one_rounding(dtype: torch.dtype, rows: Rows):
    generator = torch.Generator().manual_seed(0)
    ours = StackedGemmaNorm(L, SIZE, dtype, EPS)
    # weights that 1 + w would lose in bfloat16
    ours.weight.data.copy_(torch.randn(L, SIZE, generator=generator).mul_(0.02).to(dtype))
    x = torch.randn(sum(rows.counts), SIZE, generator=generator).to(dtype)
    expected = []
    for x_l, weight in zip(rows.by_layer(x), ours.weight[rows.layers], strict=True):
        theirs = GemmaRMSNorm(SIZE, EPS)
        theirs.weight.data.copy_(weight)
        with torch.no_grad():
            expected.append(theirs(x_l.float()))
    y = ours(x, rows)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.float(), torch.cat(expected), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-6
    )
