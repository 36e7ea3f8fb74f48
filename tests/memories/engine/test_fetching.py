"""Who waits for which page: read once for all, dropped after the last, and never taken for an earlier one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_armt.memories.engine.fetching import HOST_BYTES, Fetches
from vllm_armt.memories.engine.transfers import Failure, Report, Transfers

BAD = Failure("It is damaged.", 500)


def filled(fetches: Fetches) -> Transfers:
    transfers = Transfers()
    fetches.fill(transfers)
    return transfers


def test_a_page_is_there_once_every_worker_has_it() -> None:
    fetches = Fetches(2, 1)
    assert fetches.want("a", "pages", "k") is False
    (fetch,) = filled(fetches).fetches
    assert fetches.is_reading("a")
    fetches.receive(Report({fetch.ticket: [None]}))
    assert fetches.want("a", "pages", "k") is False
    fetches.receive(Report({fetch.ticket: [None]}))
    assert fetches.want("a", "pages", "k") is True
    assert not fetches.is_reading("a")
    fetches.load("a", 7)
    transfers = filled(fetches)
    assert (transfers.loads, transfers.drops) == ([(fetch.ticket, 7)], [fetch.ticket])


def test_requests_share_a_page_until_the_last_has_it() -> None:
    fetches = Fetches(1, 1)
    for name in "abc":
        fetches.want(name, "pages", "k")
    (fetch,) = filled(fetches).fetches
    fetches.receive(Report({fetch.ticket: [None]}))
    fetches.load("a", 1)
    fetches.release("b")
    assert filled(fetches).drops == []
    fetches.load("c", 2)
    assert filled(fetches).drops == [fetch.ticket]


def test_one_workers_failure_is_everybodys() -> None:
    fetches = Fetches(2, 1)
    fetches.want("a", "prefix", "k")
    (fetch,) = filled(fetches).fetches
    fetches.receive(Report({fetch.ticket: [None]}).aggregate(Report({fetch.ticket: [BAD]})))
    assert fetches.want("a", "prefix", "k") == BAD
    fetches.release("a")
    # who asks later has it read again
    assert fetches.want("b", "prefix", "k") is False
    (again,) = filled(fetches).fetches
    assert again.ticket != fetch.ticket
    # a late report of the first reading is of no use to the second
    fetches.receive(Report({fetch.ticket: [None, None]}))
    assert fetches.want("b", "prefix", "k") is False


def test_few_large_pages_are_held_at_a_time() -> None:
    fetches = Fetches(1, HOST_BYTES)
    fetches.want("a", "pages", "k")
    assert fetches.want("b", "pages", "other") is False
    assert [fetch.key for fetch in filled(fetches).fetches] == ["k"]
    fetches.release("a")
    fetches.want("b", "pages", "other")
    assert [fetch.key for fetch in filled(fetches).fetches] == ["other"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("wlrfp"), st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_nothing_is_left_when_nobody_waits(actions: list[tuple[str, int, int]]) -> None:
    fetches = Fetches(1, HOST_BYTES // 2)
    held: set[int] = set()
    waiting: dict[str, str] = {}
    for action, request, key in actions:
        name = f"r{request}"
        if action == "w" and waiting.get(name, f"k{key}") == f"k{key}":
            there = fetches.want(name, "pages", f"k{key}")
            waiting[name] = f"k{key}"
            if there is True and key % 2:
                fetches.load(name, 1)
                del waiting[name]
        elif action == "r":
            fetches.release(name)
            waiting.pop(name, None)
        elif action == "f":
            transfers = filled(fetches)
            held |= {fetch.ticket for fetch in transfers.fetches}
            assert {ticket for ticket, _ in transfers.loads} <= held
            held -= set(transfers.drops)
            assert len(held) <= 2
        elif action == "p":
            fetches.receive(Report({ticket: [None] for ticket in held}))
    for name in list(waiting):
        fetches.release(name)
    transfers = filled(fetches)
    held |= {fetch.ticket for fetch in transfers.fetches}
    assert held == set(transfers.drops)
