"""Pages as tensors: what one number of ranks has copied out, any other copies in."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_armt.core import SegmentLayout
from vllm_armt.core.pages import LayerPages, PageLayout, StateTensor
from vllm_armt.memories.engine import page_tensors
from vllm_armt.memories.engine.page_tensors import PageTensors

S, KV_HEADS, LAYERS, PAGES, HEAD_DIM = 4, 4, 3, 5, 8
SEGMENT = SegmentLayout(1, S, 2)
STATE = {"M": StateTensor((2, 3, 4), torch.float32), "z": StateTensor((2, 3), torch.float32)}
LAYOUT = PageLayout(S, SEGMENT.rows, KV_HEADS, HEAD_DIM, torch.bfloat16, STATE, keys_stay=True)


def ranks(size: int) -> list[PageTensors]:
    """Workers that share a model, each with a pool of its own."""
    tensors = []
    for rank in range(size):
        layout = replace(LAYOUT, kv_heads=max(KV_HEADS // size, 1))
        layers: Any = []
        for _ in range(LAYERS):
            pool = torch.zeros(PAGES, layout.page_bytes, dtype=torch.int8)
            layers.append(SimpleNamespace(layout=layout, pages=LayerPages(layout, pool), kv_cache=pool))
        tensors.append(PageTensors(layers, SEGMENT, KV_HEADS, rank, size))
    return tensors


def copy_out(workers: list[PageTensors], block: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What all ranks together copy out; the last to gather is the first rank, which gets it all."""
    gathered: list[torch.Tensor] = []

    class Group:
        def gather(self, tensor: torch.Tensor, dst: int, dim: int) -> torch.Tensor | None:
            gathered.insert(0, tensor)
            return torch.cat(gathered, dim) if len(gathered) == len(workers) else None

    monkeypatch.setattr(page_tensors, "get_tp_group", Group)
    for worker in reversed(workers[1:]):
        assert worker.copy_out(block) == {}
    return workers[0].copy_out(block)


@pytest.mark.parametrize("writers", [1, 2, 4, 8])
@pytest.mark.parametrize("readers", [1, 2, 8])
def test_any_number_of_ranks_reads_what_any_number_has_written(
    writers: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = ranks(1)
    page = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in one.spec.items()}
    assert page["layers.0.k"].shape == (KV_HEADS, S, HEAD_DIM)
    for size in (writers, readers):
        workers = ranks(size)
        for worker in workers:
            assert worker.spec == one.spec
            worker.copy_in(2, page)
        page = copy_out(workers, 2, monkeypatch)
        assert page.keys() == one.spec.keys()
    one.copy_in(3, page)
    again = one.copy_out(3)
    assert all(torch.equal(again[name], page[name]) for name in page)


def test_nothing_but_the_page_is_touched() -> None:
    (one,) = ranks(1)
    one.copy_in(2, {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in one.spec.items()})
    for other in (0, 1, 3, 4):
        assert not any(tensor.any() for tensor in one.copy_out(other).values())
    pages = one._layers[0].pages
    assert pages is not None
    # keys of memory tokens are not seen by the next segment
    assert not pages.k[2][:, :1].any()
    assert not pages.k[2][:, 1 + S :].any()
