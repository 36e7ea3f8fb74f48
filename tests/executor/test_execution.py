"""The wave and the open rows against the sequential reference, over pages whose unwritten bytes are NaN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.chunks import MODES, furthest_end
from tests.support.executor_server import MANY, Document, Server, legal, schedule_of
from tests.support.random_models import ARMT, CONFIGS, LAYERS, ON_LLAMA, Model, Pool, S, backends, m, random_model
from vllm_armt.config import ARMTConfig
from vllm_armt.linear.rows import Rows
from vllm_armt.recurrence import armt_wave as lanes


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Tensors that are made without a value are NaN, so that one read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_writes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories take three writes at a time, so that documents of few segments see all that can happen."""
    monkeypatch.setattr(lanes, "COLLECTED_ROWS", 3 * m)


@cache
def model_of(name: str, backend: str = "auto") -> Model:
    return random_model(CONFIGS[name], backend)


@st.composite
def documents(draw: st.DrawFn, model: Model) -> Document:
    """A text in any legal chunks. Beyond the prompt they are single tokens, or longer after a preemption."""
    prompt, generated = draw(st.integers(1, 5 * S)), draw(st.integers(0, 2 * S + 1))
    segmentation, length, ends = model.config.segmentation(prompt), prompt + generated, [0]
    while ends[-1] < length:
        furthest = furthest_end(segmentation, S, ends[-1], length)
        ends.append(draw(st.one_of(st.just(furthest), st.integers(ends[-1] + 1, furthest))))
    return Document(prompt, draw(st.integers(0, 3)), ends[1:])


def test_the_poison_works():
    assert torch.empty(3).isnan().all()
    pool = Pool(random_model(CONFIGS["armt"]).layout, 2)
    assert all(view[1].isnan().all() for pages in pool.layers for view in (pages.k, pages.v, *pages.state.values()))
    assert pool.is_poisoned(1)
    pool.layers[1].state["M"][1, 0, 0] = 0
    assert not pool.is_poisoned(1)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunking_of_any_batch_on_any_schedule_gives_the_sequential_result(name: str, data: st.DataObject):
    torch.manual_seed(0)
    model = model_of(name, data.draw(st.sampled_from(backends(name))))
    requests = data.draw(st.lists(documents(model), min_size=1, max_size=4))
    schedule = schedule_of(model, data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from([1, 2, 4, 7, MANY])))
    Server(model, requests, schedule, all_outputs=data.draw(st.booleans())).run()


@pytest.mark.parametrize(
    ("mode", "max_cells"),
    [
        pytest.param("sequential", MANY, id="a layer at a time"),
        pytest.param("sequential", 2, id="a layer at a time, documents in two lanes"),
        pytest.param("auto", 8, id="two layers at a time"),
        pytest.param("diagonal", MANY, id="diagonals, a lane a document"),
        pytest.param("diagonal", 2 * LAYERS, id="diagonals, documents in two lanes"),
        pytest.param("diagonal", 2, id="diagonals in parts, documents in one lane"),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_of_many_lengths_share_the_lanes_and_go_on_from_pages(name: str, mode: str, max_cells: int):
    """Some have fewer segments than the model has layers."""
    torch.manual_seed(0)
    model = model_of(name)
    requests = [
        legal(model, 7 * S, 5 * S, 7 * S),
        legal(model, 2 * S + 1, 2 * S + 1),
        legal(model, 3 * S + 2, S, 3 * S + 2, 4 * S + 1),
        legal(model, 5 * S, 4 * S, 5 * S),
        legal(model, 2 * S, 2 * S, arrival=1),
    ]
    Server(model, requests, schedule_of(model, mode, max_cells)).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["armt", "armt_sw with a sink", "rmt that closes", "prmt that closes"])
def test_the_last_layer_computes_what_is_looked_at(name: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = model_of(name)
    rows: dict[int, int] = Counter()
    complete = model.parts.layers.complete

    def counted(h: torch.Tensor, o: torch.Tensor, of: Rows) -> None:
        rows.update(dict(enumerate(of.counts, of.first_layer)))
        complete(h, o, of)

    server = Server(model, [legal(model, 3 * S, 3 * S)], schedule_of(model, mode), all_outputs=False)
    monkeypatch.setattr(model.parts.layers, "complete", counted)
    server.run()
    assert rows == {0: 3 * model.parts.layout.rows, 1: 3 * model.parts.layout.rows, 2: 3 * (1 + m)}


STAY_OPEN = [
    (name, backend)
    for name, config in CONFIGS.items()
    if config.generation_policy == "open"
    for backend in backends(name)
]


@pytest.mark.parametrize(("name", "backend"), STAY_OPEN)
def test_a_segment_that_stays_open_goes_on_over_several_pages(name: str, backend: str):
    """In single tokens, and in longer chunks as after a preemption; beside one that is still in its first page."""
    torch.manual_seed(0)
    model = model_of(name, backend)
    assert model.layout.columns == 32
    requests = [
        legal(model, 3 * S - 1, 3 * S - 1, *range(3 * S + 20, 3 * S + 30), 3 * S + 75, 3 * S + 76),
        legal(model, S, S, *range(S + 1, 3 * S)),
    ]
    Server(model, requests, schedule_of(model, "auto")).run()


@pytest.mark.parametrize(("name", "backend"), STAY_OPEN)
def test_a_segment_that_stays_open_may_begin_with_one_token(name: str, backend: str):
    """Read with the segments before it, alone behind them, and beside others; then it grows over a page."""
    torch.manual_seed(0)
    model = model_of(name, backend)
    requests = [
        legal(model, 1, *range(1, S + 3)),
        legal(model, S + 1, *range(S + 1, 2 * S + 3)),
        legal(model, 2 * S + 1, 2 * S, *range(2 * S + 1, 3 * S + 3)),
        legal(model, 5 * S + 1, 4 * S, *range(5 * S + 1, 6 * S + 3)),
        legal(model, 5 * S + 1, 6 * S + 2, arrival=2),
    ]
    Server(model, requests, schedule_of(model, "auto")).run()


@pytest.mark.parametrize("mode", MODES)
def test_the_first_segment_rule_and_the_epsilons_of_small_keys(mode: str):
    torch.manual_seed(0)
    model = random_model(CONFIGS["armt v1"], key_scale=0.02)
    requests = [
        legal(model, 1, 3 * S, *range(3 * S + 1, 5 * S + 2)),
        legal(model, 1, 5 * S + 2, arrival=1),
        legal(model, 1, *range(1, 2 * S + 2)),
    ]
    Server(model, requests, schedule_of(model, mode)).run()


@pytest.mark.parametrize("backend", ["sdpa", "vllm_cpu"])
def test_a_page_that_held_something_else_before_is_opened_clean(backend: str):
    """Two segments of different fill share a batch; the shorter one's stale columns must not spread."""
    torch.manual_seed(0)
    model = model_of("armt", backend)
    Server(model, [legal(model, 1, 1, 2), legal(model, 2, 2, 3)], schedule_of(model, "auto")).run()


@pytest.mark.parametrize("mode", MODES)
def test_memory_in_bfloat16_pages_is_the_rounded_memory_of_a_step(mode: str):
    torch.manual_seed(0)
    model = random_model(ARMTConfig(**ON_LLAMA, **ARMT, state_dtype="bfloat16"))
    server = Server(model, [legal(model, 1, 3 * S), legal(model, 1, 2 * S)], schedule_of(model, mode))
    server.run(tolerance=2**-8)
    assert {pages.state["M"].dtype for pages in server.pool.layers} == {torch.bfloat16}
