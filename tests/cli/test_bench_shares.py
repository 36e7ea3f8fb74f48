"""What the operators of a run count as."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from vllm_armt.cli.bench.shares import PREFIX, _part

POOL, ROWS, STARTS, WEIGHTS = torch.rand(4000, 256), torch.arange(4000), torch.arange(0, 4000, 20), torch.rand(4000)


@pytest.mark.parametrize(
    ("part", "work"),
    [
        ("memory", lambda: torch.embedding_bag(POOL, ROWS, STARTS, per_sample_weights=WEIGHTS)),
        ("memory", lambda: POOL.T @ POOL),
        ("elementwise", lambda: POOL * 2),
    ],
)
def test_operators_of_the_model_outside_of_all_other_ranges(part: str, work: Callable[[], Tensor]) -> None:
    with torch.inference_mode(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(PREFIX + "model"):
            work()
        work()
    spent = {"memory": 0.0, "elementwise": 0.0, "host": 0.0, "engine": 0.0}
    for event in profiler.events():
        spent[_part(event)] += event.self_cpu_time_total
    inside = {what: time for what, time in spent.items() if what in ("memory", "elementwise")}
    assert max(inside, key=lambda what: inside[what]) == part
    assert spent["engine"] > 0
