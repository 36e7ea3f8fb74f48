"""Weights packed for oneDNN: retained once, unpacked to the bit when they are loaded again."""

from __future__ import annotations

import pytest
import torch
import vllm._custom_ops as ops
from torch import Tensor

from tests.support.grouped import on_rank
from vllm_armt.linear import onednn
from vllm_armt.linear.onednn import PackedWeight
from vllm_armt.linear.weight import Part

L, IN = 3, 8

pytestmark = pytest.mark.skipif(not ops._supports_onednn, reason="this vLLM was built without oneDNN")


def packed_weight(dtype: torch.dtype) -> tuple[PackedWeight, Tensor]:
    """A packed weight, and what was loaded into it."""
    with on_rank():
        weight = PackedWeight(torch.zeros(L, 9, IN, dtype=dtype), {"a": Part(6), "b": Part(3)})
    loaded = torch.randn(L, 9, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight.data.copy_(loaded)
    weight.pack()
    return weight, loaded


def refuse_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a CPU for which oneDNN has no products of bfloat16."""
    create = ops.create_onednn_mm

    def create_onednn_mm(weight: Tensor, primitives: int) -> ops.CPUDNNLGEMMHandler:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")
        return create(weight, primitives)

    monkeypatch.setattr(ops, "create_onednn_mm", create_onednn_mm)
    monkeypatch.setattr(onednn, "onednn_dtype", onednn.onednn_dtype.__wrapped__)


def test_packed_weights_are_not_kept_twice():
    weight, _ = packed_weight(torch.float32)
    assert weight.numel() == 0


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_loaded_in_part_keeps_the_rest_to_the_bit(
    dtype: torch.dtype, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
):
    if not has_bfloat16:
        refuse_bfloat16(monkeypatch)
    weight, loaded = packed_weight(dtype)
    for _ in range(2):
        b = torch.randn(3, IN).to(dtype)
        weight.load("b", 1, b)
        loaded[1, 6:] = b
        assert weight.loadable(1).dtype == dtype
        weight.pack()
        for layer in range(L):
            assert torch.equal(weight.loadable(layer), loaded[layer])
        weight.pack()


def test_only_layers_that_were_loaded_are_packed_again():
    weight, _ = packed_weight(torch.float32)
    before = list(weight.packed)
    weight.load("a", 2, torch.randn(6, IN))
    weight.pack()
    assert [handler is old for handler, old in zip(weight.packed, before, strict=True)] == [True, True, False]


def test_what_is_loaded_takes_effect_when_it_is_packed():
    weight, loaded = packed_weight(torch.float32)

    def products() -> Tensor:
        y = torch.empty(IN, 9)
        torch.ops._C.onednn_mm(y, torch.eye(IN), None, weight.packed[0].handler_tensor)
        return y.t()

    a = torch.randn(6, IN)
    weight.load("a", 0, a)
    assert torch.equal(products(), loaded[0])
    weight.pack()
    assert torch.equal(products(), torch.cat([a, loaded[0, 6:]]))
