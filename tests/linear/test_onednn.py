"""In which type rows multiply, by what oneDNN takes on this CPU."""

from __future__ import annotations

import pytest
import torch
import vllm._custom_ops as ops
from torch import Tensor

from vllm_armt.linear import onednn as products
from vllm_armt.linear.onednn import product_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("refused", "on_cpu"),
    [
        ((), torch.bfloat16),
        ((torch.bfloat16,), torch.float32),
        ((torch.bfloat16, torch.float32), torch.bfloat16),
    ],
    ids=["it takes all", "no bfloat16", "it takes nothing, torch multiplies"],
)
def test_rows_multiply_in_their_own_type_unless_the_cpu_cannot(
    refused: tuple[torch.dtype, ...], on_cpu: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    def create_onednn_mm(weight: Tensor, primitives: int) -> None:
        if weight.dtype in refused:
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(ops, "_supports_onednn", True)
    monkeypatch.setattr(ops, "create_onednn_mm", create_onednn_mm)
    monkeypatch.setattr(products, "onednn_dtype", products.onednn_dtype.__wrapped__)
    assert product_dtype(torch.bfloat16, CPU) == on_cpu
    assert product_dtype(torch.bfloat16, CUDA) == torch.bfloat16
    assert product_dtype(torch.float32, CPU) == torch.float32
