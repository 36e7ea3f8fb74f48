"""Streamed input on the scheduler: a turn goes on behind the last token but one of the turn before."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.simulation import BOOK, OTHER, Document, Simulation, Stream, Turn, simulate

Scenario = tuple[list[Document], dict[str, Any]]


def check(simulation: Simulation) -> None:
    for name, document in simulation.documents.items():
        assert bytes(simulation.outputs[name]) == document.generated


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("stop", range(6, 14))
def test_a_turn_may_stop_on_any_token_of_a_segment(stop: int, is_async: bool) -> None:
    turns = [
        Turn(BOOK[:5], stop - 4, arrival=0, stops=True),
        Turn(OTHER[:14], 3, arrival=0, stops=True),
        Turn(OTHER[:14], 3, arrival=30, stops=False),
    ]
    stream = Stream("stream", b"", turns=turns, end=31)
    found = [Document(f"d{n}", stream.text[:n], arrival=40) for n in range(1, len(stream.text), 4)]
    check(simulate([stream, *found], is_async=is_async, slots=16).run())


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Streams, documents that find what these leave, and some that may need their pages."""
    segment_size = draw(st.sampled_from([1, 2, 3, 4, 7]))
    slots = draw(st.integers(3, 8))
    scenario = {
        "segment_size": segment_size,
        "slots": slots,
        "budget": segment_size + slots + draw(st.integers(0, 40)),
        "is_async": draw(st.booleans()),
        "prefix_caching": draw(st.sampled_from([True, True, False])),
        # two streams hold five at most
        "pages": draw(st.integers(15, 20)),
    }
    documents: list[Document] = []
    for i in range(draw(st.integers(1, 2))):
        turns, now = [], draw(st.integers(0, 9))
        for _ in range(draw(st.integers(1, 4))):
            prompt = draw(st.sampled_from([BOOK, OTHER]))[: draw(st.integers(1, 4 * segment_size + 1))]
            turns.append(Turn(prompt, draw(st.integers(1, 2 * segment_size + 2)), now, draw(st.booleans())))
            now += draw(st.sampled_from([0, 1, 5, 20]))
        stream = Stream(f"stream{i}", b"", turns=turns, end=now)
        documents.append(stream)
        for j in range(draw(st.integers(0, 3))):
            text = draw(st.sampled_from(stream.texts))
            prompt = text[: draw(st.integers(1, len(text)))]
            documents.append(Document(f"finds{i}{j}", prompt, draw(st.integers(1, 9)), draw(st.integers(0, 60))))
    for i in range(draw(st.sampled_from([0, 0, 6]))):
        documents.append(Document(f"crowd{i}", bytes([i]) * 3, draw(st.integers(20, 40)), draw(st.integers(0, 10))))
    return documents, scenario


@given(scenarios())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_turns_are_read_and_leave_memories_exactly(scenario: Scenario) -> None:
    documents, config = scenario
    check(simulate(documents, **config).run())


@pytest.mark.parametrize("new", range(3, 20))
def test_a_turn_that_ends_while_its_request_is_preempted_is_followed_by_the_next(new: int) -> None:
    crowd = [Document(f"d{i}", bytes([i]) * 3, max_tokens=40) for i in range(4)]
    turns = [Turn(BOOK[:3], new, 0, stops=True), Turn(BOOK[:9], 9, 0, stops=True)]
    stream = Stream("stream", b"", arrival=0, turns=turns, end=1)
    check(simulate([*crowd, stream], pages=11, slots=8, is_async=True, prefix_caching=False).run())
