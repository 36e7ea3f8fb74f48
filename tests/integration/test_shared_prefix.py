"""Who waits for whom: the longest common beginning, as far as somebody reads it and nobody has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.integration.shared_prefix import PrefixLeaders

TEXTS = st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4)


def hashes(text: str) -> list[str]:
    """Of every segment, one letter each: all up to it, as chained hashes stand for it."""
    return [text[: i + 1] for i in range(len(text))]


def shared(one: str, other: str) -> int:
    """Segments that two texts have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def leaders(retained: tuple[str, ...] = (), **texts: tuple[str, int]) -> PrefixLeaders:
    found = PrefixLeaders(lambda text: text in retained)
    for name, (text, begin) in texts.items():
        found.add(name, begin, len(text), hashes(text))
    return found


def test_a_reader_stops_where_the_common_beginning_ends() -> None:
    found = leaders(one=("abcde", 1))
    assert found.serve("text", hashes("abcxx"), 5)
    assert found.stops == {"one": 3}
    assert found.serve("text", hashes("abxxx"), 5)
    assert found.stops == {"one": 2}
    assert found.serve("text", hashes("abcde"), 4)
    assert found.stops == {"one": 2}, "the first that waits is served first"


def test_what_was_read_before_is_not_waited_for() -> None:
    found = leaders(one=("abcde", 3))
    assert not found.serve("text", hashes("abcxx"), 5)
    assert not found.serve("text", hashes("abcde"), 3), "no more than it can take"
    assert found.stops == {}


def test_a_memory_that_is_kept_is_not_waited_for() -> None:
    found = leaders(retained=("abc",), one=("abcde", 0))
    assert not found.serve("text", hashes("abcxx"), 5)
    assert found.serve("text", hashes("abcdx"), 5)
    assert found.stops == {"one": 4}


def test_a_text_without_segments_to_close_serves_nobody() -> None:
    found = PrefixLeaders(lambda _: False)
    found.add("one", 2, 2, hashes("ab"))
    assert not found.serve("text", hashes("abc"), 3)


@given(TEXTS, st.text("ab", max_size=8), st.data())
def test_a_text_is_served_exactly_if_somebody_reads_what_it_shares(
    texts: list[str], text: str, data: st.DataObject
) -> None:
    begins = [data.draw(st.integers(0, len(other))) for other in texts]
    found = PrefixLeaders(lambda _: False)
    for i, (other, begin) in enumerate(zip(texts, begins, strict=True)):
        found.add(str(i), begin, len(other), hashes(other))
    reading = [
        common for common, begin in zip((shared(other, text) for other in texts), begins, strict=True) if common > begin
    ]
    assert found.serve("text", hashes(text), len(text)) == bool(reading)
    assert all(stop in reading for stop in found.stops.values())


@given(TEXTS, st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4, unique=True), st.data())
def test_what_is_remembered_from_step_to_step_is_what_would_be_found_anew(
    texts: list[str], waiting: list[str], data: st.DataObject
) -> None:
    kept: set[str] = set()
    found = PrefixLeaders(kept.__contains__)
    begins = {str(i): 0 for i in range(len(texts))}
    for _ in range(data.draw(st.integers(1, 8))):
        reading = {name: texts[int(name)] for name in begins if data.draw(st.booleans())}
        anew = PrefixLeaders(kept.__contains__)
        found.begin_step()
        for name, text in reading.items():
            for some in (found, anew):
                some.add(name, begins[name], len(text), hashes(text))
        for text in waiting:
            waits = found.waits(text) or found.serve(text, hashes(text), len(text))
            assert waits or not anew.serve(text, hashes(text), len(text))
            # somebody reads what it waits for, which is not there, and stops behind it at the latest
            common = {name: shared(text, other) for name, other in reading.items()}
            ahead = [name for name, n in common.items() if begins[name] < n and text[:n] not in kept]
            assert not waits or any(found.stops.get(name, 9) <= common[name] for name in ahead)
        for name, text in reading.items():
            end = data.draw(st.integers(begins[name], len(text)))
            begins[name] = min(end, found.stops.get(name, end))
            kept |= {text[: begins[name]]} - {""}
        kept -= set(data.draw(st.lists(st.sampled_from(sorted(kept) or [""]), max_size=1)))
