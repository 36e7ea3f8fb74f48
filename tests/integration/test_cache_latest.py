"""The latest memory of a text that waits: always the one that a fresh walk finds, with each segment looked up once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.integration.cache.latest import LatestMemories

TEXTS = st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=4, unique=True)


def hashes(text: str) -> list[bytes]:
    """Of every segment, one letter each: all up to it, as chained hashes stand for it."""
    return [text[: i + 1].encode() for i in range(len(text))]


class Pages(dict[bytes, bytes]):
    """Kept memories; counts look-ups."""

    lookups = 0

    def look_up(self, block_hash: bytes) -> bytes | None:
        self.lookups += 1
        return self.get(block_hash)


@given(TEXTS, st.data())
def test_what_is_found_is_what_a_walk_would_find(texts: list[str], data: st.DataObject) -> None:
    pages = Pages()
    memories: LatestMemories[bytes] = LatestMemories(pages.look_up)
    calls = dict.fromkeys(texts, 0)
    num_published = 0
    for _ in range(data.draw(st.integers(1, 30))):
        event, text = (
            data.draw(st.sampled_from(["publish", "evict", "find", "find"])),
            data.draw(st.sampled_from(texts)),
        )
        if event == "publish":
            segments = data.draw(st.sets(st.integers(0, len(text) - 1), max_size=3))
            pages |= {hashes(text)[segment]: hashes(text)[segment] for segment in segments}
            memories.note(hashes(text), segments)
            num_published += len(segments)
        elif event == "evict" and pages:
            del pages[data.draw(st.sampled_from(sorted(pages)))]
        elif event == "find":
            calls[text] += 1
            kept = [segment for segment, block_hash in enumerate(hashes(text)) if block_hash in pages]
            expected = (kept[-1], hashes(text)[kept[-1]]) if kept else None
            assert memories.find(text, hashes(text), len(text)) == expected
    assert pages.lookups <= sum(len(text) + calls[text] for text in texts) + num_published * len(texts)


def test_a_text_of_another_length_is_looked_up_anew() -> None:
    pages = Pages({b"abc": b"abc"})
    memories: LatestMemories[bytes] = LatestMemories(pages.look_up)
    assert memories.find("grows", hashes("abc"), 2) is None
    assert memories.find("grows", hashes("abcd"), 4) == (2, b"abc")


def test_a_text_that_was_forgotten_is_looked_up_anew() -> None:
    pages = Pages()
    memories: LatestMemories[bytes] = LatestMemories(pages.look_up)
    assert memories.find("text", hashes("abc"), 3) is None
    memories.forget("text")
    pages[b"ab"] = b"ab"
    assert memories.find("text", hashes("abc"), 3) == (1, b"ab")
