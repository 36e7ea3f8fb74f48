"""How a step's tokens are granted out and cut into chunks, and which limits leave room for that."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_armt.core import Segmentation
from vllm_armt.integration.sharing import chunk_length, legal_limits, round_robin


@given(st.integers(1, 40), st.dictionaries(st.text(), st.integers(1, 60)), st.integers(0, 200))
def test_dealing_is_even_in_whole_segments_and_uses_the_budget(segment_size, needs, budget):
    granted = round_robin(budget, needs, segment_size)
    left = budget - sum(granted.values())
    assert left >= 0
    for document, tokens in granted.items():
        assert tokens == needs[document] or tokens % segment_size == 0
        if tokens < needs[document]:
            assert left < segment_size
            assert all(other < tokens + 2 * segment_size for other in granted.values())


@pytest.mark.parametrize(
    ("start", "end", "text_end", "length"),
    [(0, 40, 100, 32), (0, 40, 40, 40), (32, 40, 100, 0), (32, 100, 100, 68), (5, 40, 100, 11), (5, 15, 100, 0)],
)
def test_a_chunk_ends_on_a_boundary_or_with_the_text(start, end, text_end, length):
    assert chunk_length(start, end, text_end, Segmentation(16), page_tokens=16) == length


@pytest.mark.parametrize(
    ("segmentation", "start", "end", "text_end", "length"),
    [
        pytest.param(Segmentation(16, last=2), 0, 70, 100, 64, id="to a page of the open segment"),
        pytest.param(Segmentation(16, last=2), 35, 70, 100, 29, id="from inside a page"),
        pytest.param(Segmentation(16, last=2), 35, 70, 70, 35, id="to the end of the text"),
        pytest.param(Segmentation(16, last=2), 5, 70, 100, 11, id="from inside a closed segment"),
        pytest.param(Segmentation(16, lead=3, last=4), 0, 60, 100, 13, id="a short first segment alone"),
        pytest.param(Segmentation(16, lead=3, last=4), 13, 60, 100, 32, id="whole ones behind it"),
        pytest.param(Segmentation(16, lead=3, last=2), 13, 80, 100, 64, id="into the open one, page by page"),
        pytest.param(Segmentation(11, last=4), 11, 60, 100, 11, id="one of those of equal length"),
        pytest.param(Segmentation(11, last=4), 44, 80, 100, 32, id="pages are longer than these"),
    ],
)
def test_a_chunk_follows_the_segments_of_its_request(segmentation, start, end, text_end, length):
    assert chunk_length(start, end, text_end, segmentation, page_tokens=16) == length


@pytest.mark.parametrize(
    ("given_limits", "legal"), [((8192, 0), (8192, 0)), ((512, 1), (1280, 1024)), ((2048, 1500), (2048, 2048))]
)
def test_limits_are_raised_until_a_step_holds_a_segment(given_limits, legal):
    assert legal_limits(1024, 256, *given_limits) == legal
