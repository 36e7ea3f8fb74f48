"""How many products a group of layers takes, by torch's own and with `grouped_mm`."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from vllm_armt.linear.batched import BatchedGemm
from vllm_armt.linear.grouped import GroupedGemm
from vllm_armt.linear.rows import Rows

UNIFORM, ONE_LAYER = Rows(0, (3, 3, 3)), Rows(2, (4,))
RAGGED = Rows(0, (1, 1, 2, 2), torch.tensor([1, 2, 4, 6], dtype=torch.int32))


@pytest.mark.parametrize(
    ("gemm", "rows", "batched", "grouped"),
    [
        pytest.param(BatchedGemm, ONE_LAYER, 0, 0, id="one layer: neither"),
        pytest.param(GroupedGemm, ONE_LAYER, 0, 0, id="one layer, grouped: neither"),
        pytest.param(BatchedGemm, UNIFORM, 1, 0, id="uniform: one batched product"),
        pytest.param(GroupedGemm, UNIFORM, 1, 0, id="uniform, grouped: one batched product"),
        pytest.param(BatchedGemm, RAGGED, 2, 0, id="ragged: a batched one for each run of equal layers"),
        pytest.param(GroupedGemm, RAGGED, 0, 1, id="ragged, grouped: one grouped product"),
    ],
)
def test_a_group_is_as_few_products_as_there_are(gemm: type[BatchedGemm], rows: Rows, batched: int, grouped: int):
    weight = torch.randn(len(rows.counts), 6, 8, dtype=torch.bfloat16)
    x = torch.randn(sum(rows.counts), 8, dtype=torch.bfloat16)
    with (
        patch.object(torch, "bmm", wraps=torch.bmm) as bmm,
        patch.object(F, "grouped_mm", wraps=F.grouped_mm) as grouped_mm,
    ):
        gemm().multiply(x, weight, rows, None)
    assert (bmm.call_count, grouped_mm.call_count) == (batched, grouped)
