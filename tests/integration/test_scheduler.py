"""The scheduler hook on vLLM's real scheduler, without a model; `simulation` checks every step."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.support.admission import requests_without_tokens_are_skipped
from tests.support.simulation import BOOK, OTHER, Document, continued, open_begin, simulate

CUTS = [("commit", "left"), ("open", "left"), ("open", "right"), ("open", "center")]
"""Where segments lie: every generation policy with every alignment that goes with it."""


@pytest.fixture(params=[nullcontext, requests_without_tokens_are_skipped], ids=["ends", "skips"], autouse=True)
def admission(request: pytest.FixtureRequest) -> Iterator[None]:
    """What vLLM does once a waiting request gets no tokens: it ends admission, or skips the request."""
    with request.param():
        yield


def room(document: Document, config: dict) -> int:
    """Tokens that a document may generate: what it asks for, or what its open segment has room for."""
    if config["generation_policy"] == "commit":
        return document.max_tokens
    most = 3 + 2 * config["is_async"]
    open_tokens = min(config["max_open_tokens"], (config["pages"] - most + 1) * config["segment_size"])
    begin = open_begin(len(document.prompt), config["segment_size"], config["segment_alignment"])
    return min(document.max_tokens, begin + open_tokens - len(document.prompt) + 1)


@st.composite
def scenarios(draw):
    segment_size = draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    slots = draw(st.integers(1, 5))
    is_async = draw(st.booleans())
    policy, alignment = draw(st.sampled_from(CUTS))
    scenario = {
        "segment_size": segment_size,
        "slots": slots,
        "budget": segment_size + slots + draw(st.integers(0, 40)),
        "pages": draw(st.integers(3 + 2 * is_async, 20)),
        "is_async": is_async,
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "generation_policy": policy,
        "segment_alignment": alignment,
        "max_open_tokens": draw(st.integers(segment_size, 12 * segment_size)),
        "prefix_caching": alignment == "left" and draw(st.sampled_from([True, True, False])),
    }
    documents = []
    for i in range(draw(st.integers(1, 8))):
        arrival = draw(st.integers(0, 20))
        book = draw(st.sampled_from([BOOK, OTHER]))[: draw(st.integers(1, 12 * segment_size + 3))]
        documents.append(
            Document(
                name=f"d{i}",
                # maybe what another document has generated, and so can find in the prefix cache
                prompt=continued(book, draw(st.sampled_from([0, 0, segment_size, 2 * segment_size + 1]))),
                max_tokens=draw(st.integers(1, 3 * segment_size)),
                arrival=arrival,
                abort=draw(st.none() | st.integers(arrival + 1, arrival + 15)),
                priority=draw(st.integers(0, 2)),
                prompt_logprobs=draw(st.integers(0, 5)) == 0,
            )
        )
    return documents, scenario


@given(scenarios())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_load_is_served_exactly_and_within_its_pages(scenario):
    documents, config = scenario
    simulation = simulate(documents, **config).run()
    for document in documents:
        expected = list(document.text[len(document.prompt) :])[: room(document, config)]
        produced = simulation.outputs[document.name]
        if document.abort is None:
            assert produced == expected
        else:
            assert produced == expected[: len(produced)]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_that_do_not_fit_are_preempted_and_resume(policy, is_async):
    documents = [Document(f"d{i}", bytes([i]) * 3, max_tokens=40, priority=-i) for i in range(8)]
    simulation = simulate(documents, pages=9, slots=8, policy=policy, is_async=is_async).run()
    assert simulation.num_preemptions > 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_text_that_was_read_before_is_found_again(is_async):
    documents = [
        Document("first", BOOK[:202]),
        Document("again", BOOK[:202], arrival=8),
        Document("longer", BOOK[:300], arrival=20),
        Document("other", OTHER[:202], arrival=8),
    ]
    simulation = simulate(documents, is_async=is_async).run()
    assert simulation.num_hit_tokens == 2 * 200


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("new", range(1, 10))
def test_what_is_left_by_a_text_that_stops_early_is_its_memory(new: int, is_async: bool):
    # if steps overlap, one more is under way when it stops, in which a segment may close or begin
    stops = Document("stops", BOOK[:5], max_tokens=new, stops=True)
    found = [Document(f"d{n}", stops.text[:n] + OTHER[:9], arrival=20 + 5 * n) for n in range(1, len(stops.text) + 1)]
    simulation = simulate([stops, *found], is_async=is_async).run()
    assert bytes(simulation.outputs["stops"]) == stops.generated
    # the tokens before the last are computed whether steps overlap or not, and only memories of those are found
    assert simulation.num_hit_tokens == sum(min(n, (4 + new) // 4 * 4) // 4 * 4 for n in range(1, len(stops.text) + 1))


def test_an_aligned_prompt_asked_again_computes_its_last_segment_only():
    simulation = simulate([Document("first", BOOK[:200]), Document("again", BOOK[:200], arrival=8)]).run()
    assert simulation.num_hit_tokens == 196


def test_a_conversation_goes_on_from_the_memory_of_its_last_turn():
    turn = Document("turn", BOOK[:100], max_tokens=22)
    follow_up = Document("follow-up", turn.text[:-1] + b"and then?", arrival=60)
    assert simulate([turn, follow_up]).run().num_hit_tokens == 120


def test_prompt_logprobs_are_computed_without_the_prefix_cache():
    documents = [Document("first", BOOK[:200]), Document("again", BOOK[:200], arrival=8, prompt_logprobs=True)]
    assert simulate(documents).run().num_hit_tokens == 0


def test_equal_texts_that_arrive_together_are_read_once():
    documents = [Document(f"d{i}", BOOK[:1001]) for i in range(4)]
    simulation = simulate(documents).run()
    assert simulation.num_hit_tokens == 3 * 1000
    assert len(simulation.steps) < 1001 / 64 + 4


@pytest.mark.parametrize(("shared", "own"), [(4, 12), (40, 12), (120, 8), (400, 40)])
def test_a_common_beginning_is_read_once(shared: int, own: int):
    documents = [Document(f"d{i}", BOOK[:shared] + bytes([i] * own)) for i in range(16)]
    with_cache, without = (
        simulate(documents, pages=400, slots=16, budget=272, prefix_caching=caching).run() for caching in (True, False)
    )
    assert with_cache.num_hit_tokens == 15 * shared
    assert len(with_cache.steps) <= max(2, len(without.steps))


def test_beginnings_within_beginnings_are_read_once():
    texts = [BOOK[:100], BOOK[:60] + b"another", BOOK[:60] + b"a third", BOOK[:20] + b"and a fourth"]
    simulation = simulate([Document(f"d{i}", text) for i, text in enumerate(texts)], budget=200).run()
    assert simulation.steps[:3] == [{"d0": 20}, {"d0": 40, "d3": 12}, {"d0": 40, "d1": 7, "d2": 7}]
    assert simulation.num_hit_tokens == 60 + 60 + 20


def test_nobody_waits_for_a_memory_that_is_kept():
    before = Document("before", BOOK[:40] + b"one")
    documents = [Document(f"d{i}", BOOK[:40] + bytes([i] * 9), arrival=9) for i in range(3)]
    steps = simulate([before, *documents]).run().steps
    assert steps[-1] == {"d0": 9, "d1": 9, "d2": 9}


def test_texts_that_wait_for_an_equal_one_do_not_hold_up_others():
    documents = [Document("a", BOOK[:2001]), Document("b", BOOK[:2001]), Document("other", OTHER[:9])]
    simulation = simulate(documents, pages=9).run()
    assert "other" in simulation.steps[0]


def test_a_memory_whose_writer_was_preempted_in_the_same_step_is_not_served():
    # "urgent" takes the page that "late" was to write its last segment's memory to, and "late" resumes
    late = Document("late", BOOK[:17], max_tokens=4, priority=1)
    urgent = Document("urgent", OTHER[:9], max_tokens=5, priority=0, arrival=1)
    simulation = simulate([late, urgent], pages=5, slots=3, budget=11, policy="priority").run()
    assert simulation.num_preemptions > 0


def test_a_million_tokens_are_admitted_with_three_free_pages():
    document = Document("long", bytes(1_000_000), max_tokens=2)
    simulation = simulate([document], segment_size=1024, pages=3, budget=65536).run()
    assert simulation.max_pages == 3
    assert simulation.num_preemptions == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_question_of_high_priority_starts_in_the_step_after_it_came(is_async: bool):
    long = Document("long", bytes(100_000), max_tokens=2, priority=1)
    question = Document("question", OTHER[:2000], max_tokens=3, priority=0, arrival=7)
    # a step has room for two segments, the second one of the question is short
    simulation = simulate([long, question], segment_size=1024, budget=2052, policy="priority", is_async=is_async).run()
    assert simulation.steps[7:9] == [{"long": 1024, "question": 1024}, {"long": 1024, "question": 976}]
    assert simulation.num_preemptions == 0


def test_a_lone_document_gets_the_whole_step():
    simulation = simulate([Document("lone", BOOK[:1000])], budget=70).run()
    assert [step["lone"] for step in simulation.steps[:-1]] == [68] * 14


def test_documents_share_a_step_evenly_beside_the_decodes():
    documents = [Document("chat", BOOK[:3], max_tokens=50)]
    documents += [Document(name, bytes([i]) * 400, arrival=1) for i, name in enumerate("abc")]
    simulation = simulate(documents, budget=49).run()
    assert simulation.steps[1] == simulation.steps[2] == {"chat": 1, "a": 16, "b": 16, "c": 16}


def test_documents_that_do_not_fit_a_step_take_turns():
    documents = [Document(f"d{i}", bytes([i]) * 80) for i in range(6)]
    simulation = simulate(documents, slots=6, budget=10).run()
    reading = simulation.steps[6:30]
    for document in documents:
        served = [i for i, step in enumerate(reading) if document.name in step]
        assert served == list(range(served[0], len(reading), 3))


def test_what_a_new_document_finds_in_the_cache_leaves_its_share_to_the_next():
    documents = [
        Document("first", BOOK[:202]),
        Document("again", BOOK[:202], arrival=8),
        Document("fresh", OTHER[:202], arrival=8),
    ]
    assert simulate(documents).run().steps[8] == {"again": 2, "fresh": 60}


@pytest.mark.parametrize("lacks", ["pages", "pages above the watermark", "slots"])
def test_a_request_that_cannot_start_takes_no_share(lacks):
    simulation = simulate(
        [Document("reads", BOOK[:1001]), Document("waits", OTHER[:101], arrival=2)],
        pages=5 if lacks == "pages" else 20,
    )
    if lacks == "slots":
        simulation.scheduler.num_waiting_for_streaming_input = 3
    if lacks == "pages above the watermark":
        simulation.scheduler.kv_cache_manager.watermark_blocks = 16
    simulation.run()
    assert [step["reads"] for step in simulation.steps[:15]] == [64] * 15


def test_a_short_request_starts_on_the_page_that_a_long_document_leaves():
    documents = [Document("long", BOOK[:2001]), Document("short", OTHER[:3], max_tokens=2, arrival=4)]
    assert "short" in simulate(documents, pages=4).run().steps[5]


def test_an_equal_text_is_not_waited_for_if_it_is_read_without_the_cache():
    documents = [
        Document("first", BOOK[:402]),
        Document("slow", BOOK[:402], arrival=10, prompt_logprobs=True),
        Document("quick", BOOK[:402], arrival=11),
    ]
    simulation = simulate(documents).run()
    assert simulation.steps[11]["quick"] == 2


def test_short_arrivals_do_not_starve_a_long_document_nor_it_them():
    arrivals = [Document(f"short{i}", OTHER[i : i + 8], arrival=i) for i in range(200)]
    simulation = simulate([Document("long", BOOK[:800]), *arrivals], slots=8, budget=12).run()
    finished = max(i for i, step in enumerate(simulation.steps) if "long" in step)
    assert finished < 600
    first_served = [next(i for i, step in enumerate(simulation.steps) if f"short{n}" in step) for n in range(200)]
    assert first_served == sorted(first_served)
    assert first_served[5] < finished


def test_a_short_text_does_not_take_the_slot_that_a_longer_one_waits_for():
    # when "other" is through it is the turn of "long", beside which a step has room for "short", but not for "first"
    documents = [Document("long", BOOK[:400]), Document("other", OTHER[:8])]
    documents += [Document("first", OTHER[9:50], arrival=1), Document("short", b"ab", arrival=1)]
    simulation = simulate(documents, slots=2, budget=6).run()
    started = list(dict.fromkeys(name for step in simulation.steps for name in step))
    assert started == ["long", "other", "first", "short"]


def test_a_step_too_small_for_a_segment_is_refused():
    with pytest.raises(ValueError, match=r"--max-num-batched-tokens .* to 20 or more"):
        simulate([], segment_size=16, slots=4, budget=19)


def test_the_scheduler_is_asynchronous_when_the_config_says_so():
    assert isinstance(simulate([], is_async=True).scheduler, AsyncScheduler)
    assert not isinstance(simulate([], is_async=False).scheduler, AsyncScheduler)
