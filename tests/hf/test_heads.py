"""Memory heads and gating, of which there are no goldens: a layer against the second generation's formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.small_hf import Small
from vllm_armt.hf import RecurrentCache
from vllm_armt.hf.modeling_armt import ARMTLayer
from vllm_armt.hf.modeling_recurrent import Call

B, H, P, D, M_TOKENS = 2, 2, 4, 64, 3


def to_heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], H, -1).transpose(1, 2)


def phi(u: Tensor) -> Tensor:
    x = torch.cat([u.relu(), (-u).relu()], dim=-1)
    return F.normalize(torch.cat([x * x.roll(j, dims=-1) for j in (1, 2, 3)], dim=-1), dim=-1)


def written(
    layer: ARMTLayer, o: Tensor, M: Tensor, z: Tensor, *, gating: bool, use_denom: bool
) -> tuple[Tensor, Tensor]:
    """M and z after one more segment; the first if M is zero."""
    k, v = phi(to_heads(layer.W_mk(o))), to_heads(layer.W_mv(o))
    beta = to_heads(layer.W_mb(o).sigmoid())
    prev, gamma = torch.einsum("bhjk,bhkt->bhjt", k, M), torch.ones(())
    if use_denom and M.any():
        den = torch.einsum("bhk,bhjk->bhj", z, k)[..., None] + 1e-5
        prev, gamma = prev / den, (1 - den / k.square().sum(-1, keepdim=True)).clip(0, 1)
    M = M + torch.einsum(f"bhjk,bhjt,bhj{'t' if gating else 'x'}->bhkt", k, v - prev, beta)
    return M, z + (gamma * k).sum(-2) if use_denom else z


@torch.no_grad()
@pytest.mark.parametrize("use_denom", [False, True])
@pytest.mark.parametrize("gating", [False, True])
def test_a_layer_writes_and_reads_each_head_by_itself(gating: bool, use_denom: bool) -> None:
    options = {"n_heads": H, "gating": gating, "use_denom": use_denom}
    model = Small("armt", "llama", options).build()
    layer = model.model.model.layers[1]
    layer.layer = nn.Identity()
    cache: RecurrentCache = model._initial_state(B)
    M, z = torch.zeros(B, H, 6 * P // H, D // H), torch.zeros(B, H, 6 * P // H)
    for segment in range(3):
        rows = torch.randn(B, 5 + M_TOKENS, D)
        layer.call = Call(cache, prefix=0, suffix=M_TOKENS)
        output = layer(rows)
        read = torch.zeros_like(rows)
        if segment:
            q = phi(to_heads(layer.W_mq(rows)))
            den = torch.einsum("bhk,bhjk->bhj", z, q)[..., None] + 1e-5 if use_denom else 1
            read = (torch.einsum("bhjk,bhkt->bhjt", q, M) / den).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output, rows + read)
        M, z = written(layer, output[:, -M_TOKENS:], M, z, gating=gating, use_denom=use_denom)
        torch.testing.assert_close((cache.M[1], cache.z[1]), (M, z))
        cache.segments += 1
