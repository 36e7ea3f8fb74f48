"""Who waits for whom: the longest common beginning, as far as somebody reads it and nobody has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.integration.shared_prefix import PrefixLeaders

TEXTS = st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4)


def hashes(text: str) -> list[str]:
    """Of every segment, one letter each: all up to it, as chained hashes stand for it."""
    return [text[: i + 1] for i in range(len(text))]


def leaders(retained: tuple[str, ...] = (), **texts: tuple[str, int]) -> PrefixLeaders:
    found = PrefixLeaders(lambda text: text in retained)
    for name, (text, begin) in texts.items():
        found.add(name, begin, len(text), hashes(text))
    return found


def test_a_reader_stops_where_the_common_beginning_ends() -> None:
    found = leaders(one=("abcde", 1))
    assert found.serve(hashes("abcxx"), 5)
    assert found.stops == {"one": 3}
    assert found.serve(hashes("abxxx"), 5)
    assert found.stops == {"one": 2}
    assert found.serve(hashes("abcde"), 4)
    assert found.stops == {"one": 2}, "the first that waits is served first"


def test_what_was_read_before_is_not_waited_for() -> None:
    found = leaders(one=("abcde", 3))
    assert not found.serve(hashes("abcxx"), 5)
    assert not found.serve(hashes("abcde"), 3), "no more than it can take"
    assert found.stops == {}


def test_a_memory_that_is_kept_is_not_waited_for() -> None:
    found = leaders(retained=("abc",), one=("abcde", 0))
    assert not found.serve(hashes("abcxx"), 5)
    assert found.serve(hashes("abcdx"), 5)
    assert found.stops == {"one": 4}


def test_a_text_without_segments_to_close_serves_nobody() -> None:
    found = PrefixLeaders(lambda _: False)
    found.add("one", 2, 2, hashes("ab"))
    assert not found.serve(hashes("abc"), 3)


@given(TEXTS, st.text("ab", max_size=8), st.data())
def test_a_text_is_served_exactly_if_somebody_reads_what_it_shares(
    texts: list[str], text: str, data: st.DataObject
) -> None:
    begins = [data.draw(st.integers(0, len(other))) for other in texts]
    found = PrefixLeaders(lambda _: False)
    for i, (other, begin) in enumerate(zip(texts, begins, strict=True)):
        found.add(str(i), begin, len(other), hashes(other))
    shared = [
        next((i for i, (a, b) in enumerate(zip(other, text, strict=False)) if a != b), min(len(other), len(text)))
        for other in texts
    ]
    reading = [common for common, begin in zip(shared, begins, strict=True) if common > begin]
    assert found.serve(hashes(text), len(text)) == bool(reading)
    assert all(stop in reading for stop in found.stops.values())
