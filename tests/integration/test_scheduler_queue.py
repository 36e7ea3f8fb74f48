"""What requests that wait cost the scheduler: look-ups are counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.lookups import Lookups, counted_lookups
from tests.support.simulation import BOOK, OTHER, Document, Simulation, simulate


@pytest.fixture
def lookups() -> Iterator[Lookups]:
    with counted_lookups() as counted:
        yield counted


def steps(simulation: Simulation, lookups: Lookups, n: int) -> list[Lookups]:
    """The look-ups of so many steps."""
    lookups.take()
    counts = []
    for _ in range(n):
        simulation.step()
        counts.append(lookups.take())
    return counts


@pytest.mark.parametrize("is_async", [False, True])
def test_a_text_that_waits_for_pages_is_walked_through_once(lookups: Lookups, is_async: bool) -> None:
    later = {}
    for length in (800, 3200):
        # those that decode close segments all the time
        documents = [Document(f"d{i}", bytes([i]) * 3, max_tokens=90) for i in range(4)]
        documents.append(Document("waits", BOOK[:length], arrival=9))
        simulation = simulate(documents, slots=8, pages=10, is_async=is_async)
        steps(simulation, lookups, 9)
        first, *rest = steps(simulation, lookups, 60)
        assert [request.request_id for request in simulation.scheduler.waiting] == ["waits"]
        assert first.pages == length // 4 - 1
        later[length] = [(count.pages, count.hashes) for count in rest]
        assert max(later[length]) <= (2, 9)
        simulation.run()
    assert later[800] == later[3200]


def test_what_is_evicted_while_a_text_waits_is_not_looked_up_again(lookups: Lookups) -> None:
    # its pages are taken by those that decode, the one of 400 tokens last
    documents = [Document("before", BOOK[:400])]
    documents += [Document(f"d{i}", bytes([i]) * 3, max_tokens=90, arrival=40) for i in range(4)]
    documents.append(Document("waits", BOOK[:3200], arrival=50))
    simulation = simulate(documents, slots=8, pages=10)
    steps(simulation, lookups, 50)
    counts = steps(simulation, lookups, 60)
    assert [request.request_id for request in simulation.scheduler.waiting] == ["waits"]
    assert sum(count.pages for count in counts) <= 800 + 2 * len(counts)
    simulation.run()


def test_a_text_that_waits_finds_what_is_left_meanwhile() -> None:
    documents = [Document(f"d{i}", bytes([i]) * 3, max_tokens=90) for i in range(3)]
    turn = Document("turn", BOOK[:3], max_tokens=28)
    documents += [turn, Document("follow-up", turn.text + OTHER[:9], arrival=9)]
    simulation = simulate(documents, slots=8, pages=9)
    while len(simulation.steps) < 25:
        simulation.step()
    assert [request.request_id for request in simulation.scheduler.waiting] == ["follow-up"]
    assert simulation.run().num_hit_tokens == 28


@pytest.mark.parametrize("own", [0, 8])
def test_texts_that_wait_for_a_common_beginning_are_compared_once(lookups: Lookups, own: int) -> None:
    later = {}
    for length in (400, 1600):
        for followers in (4, 200):
            documents = [Document("leads", BOOK[:length] + b"end"), Document("other", OTHER[:1000])]
            documents += [
                Document(f"d{i}", BOOK[:length] + bytes([i]) * own + b"end", arrival=1) for i in range(followers)
            ]
            simulation = simulate(documents, slots=3, budget=12)
            simulation.step()
            first, *rest = steps(simulation, lookups, 40)
            assert len(simulation.scheduler.waiting) == followers
            assert first.pages <= 4
            # the first one is compared by bisection, and so is each that goes on by itself
            assert first.hashes <= 40 + followers * (60 if own else 4)
            later[length, followers] = [(count.pages, count.hashes) for count in rest]
            assert max(later[length, followers]) <= (4, 20)
    assert len(set(map(str, later.values()))) == 1, "neither the length nor the number of those that wait counts"


def test_texts_whose_leader_is_aborted_are_compared_with_the_next(lookups: Lookups) -> None:
    leads = Document("leads", BOOK[:400], abort=9)
    documents = [leads, *(Document(f"d{i}", BOOK[:400], arrival=1) for i in range(200))]
    simulation = simulate(documents, slots=3, budget=12)
    steps(simulation, lookups, 9)
    first, *rest = steps(simulation, lookups, 10)
    assert first.hashes <= 40 + 4 * 200
    assert max(count.hashes for count in rest) <= 20
    assert simulation.run(max_steps=2000).num_hit_tokens > 199 * 390
