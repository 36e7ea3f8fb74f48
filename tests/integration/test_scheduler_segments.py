"""The scheduler where segments depend on the prompt: one that stays open, and alignments other than left."""

import pytest
from vllm.v1.engine import FinishReason

from tests.support.simulation import (
    BOOK,
    OTHER,
    Document,
    Simulation,
    continued,
    make_scheduler,
    open_begin,
    simulate,
    vllm_config,
)
from vllm_armt.config import ARMTConfig
from vllm_armt.integration.open_segments import logger


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("prompt", [1, 9, 11, 12])
def test_an_open_segment_grows_over_as_many_pages_as_it_needs(prompt, alignment, is_async):
    documents = [Document("long", BOOK[:prompt], max_tokens=30), Document("short", BOOK[:prompt], max_tokens=2)]
    simulation = simulate(
        documents, generation_policy="open", segment_alignment=alignment, is_async=is_async, prefix_caching=False
    ).run()
    assert {name: len(tokens) for name, tokens in simulation.outputs.items()} == {"long": 30, "short": 2}
    begin = open_begin(prompt, 4, alignment)
    assert simulation.max_pages == (begin > 0) + -(-(prompt + 29 - begin) // 4)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("prompt", "new"), [(9, 20), (11, 18), (12, 17), (1, 20)])
@pytest.mark.parametrize("lacks", ["positions", "pages"])
def test_an_open_segment_without_room_ends_its_request_alone(prompt, new, lacks, is_async, monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "warning", lambda message, *args: lines.append(message % args))
    documents = [
        Document("fits", BOOK[:prompt], max_tokens=new),
        Document("outgrows", BOOK[:prompt], max_tokens=new + 30),
        Document("after", BOOK[:prompt], max_tokens=new, arrival=8),
    ]
    # 20 tokens: with five pages of keys, one of memory and one or three of the steps before
    limits = {"max_open_tokens": 20} if lacks == "positions" else {"pages": 7 + 2 * is_async}
    simulation = simulate(documents, generation_policy="open", is_async=is_async, **limits).run()
    assert {name: len(tokens) for name, tokens in simulation.outputs.items()} == dict.fromkeys(simulation.outputs, new)
    assert set(simulation.finish_reasons.values()) == {FinishReason.LENGTH}
    (line,) = lines
    assert "outgrows" in line
    assert f"max_tokens is {new + 30}, but the prompt of {prompt} tokens leaves room for {new}" in line
    assert {"positions": "as the base model takes", "pages": "--kv-cache-memory-bytes"}[lacks] in line


@pytest.mark.parametrize("is_async", [False, True])
def test_a_text_whose_open_segment_has_all_pages_is_read_again(is_async):
    # a step that begins in segment 85 and ends in 86, the open one, needs a page more than 86 does later
    document = Document("long", BOOK[:345], max_tokens=100)
    simulation = simulate(
        [document],
        pages=18 + 2 * is_async,
        budget=68,
        prefix_caching=False,
        generation_policy="open",
        is_async=is_async,
    )
    while len(simulation.outputs["long"]) < 63:
        simulation.step()
    simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
    simulation.run(max_steps=200)
    assert simulation.max_pages >= 18
    assert len(simulation.outputs["long"]) == 64


def test_a_text_grown_past_its_open_segment_does_not_resume_from_a_memory_of_it():
    longer = Document("longer", continued(BOOK[:9], 20), arrival=5)
    simulation = simulate([Document("before", BOOK[:9]), longer], generation_policy="open").run()
    grown = Document("grown", BOOK[:9]).request(segment_size=4, prefix_caching=True)
    grown.append_output_token_ids(list(longer.prompt[9:]))
    assert simulation.scheduler.kv_cache_manager.get_computed_blocks(grown)[1] == 28
    blocks, num_tokens, *_ = simulation.scheduler._get_local_prefix_cache_hit(grown)
    assert num_tokens == 8
    assert [block.is_null for block in blocks.blocks[0]] == [True, False]


def test_a_memory_before_the_open_segment_is_found_again():
    documents = [Document("first", BOOK[:10], max_tokens=9), Document("longer", BOOK[:18], arrival=20)]
    assert simulate(documents, generation_policy="open").run().num_hit_tokens == 8


def test_only_a_segment_that_closes_is_waited_for():
    documents = [Document("ends", BOOK[:16]), Document("goes on", BOOK[:21])]
    steps = simulate(documents, budget=8, generation_policy="open").run().steps
    assert steps[:3] == [{"ends": 8}, {"ends": 4}, {"ends": 4, "goes on": 4}]


def test_a_memory_of_the_segment_that_a_text_keeps_open_is_not_waited_for():
    longer = Document("longer", continued(BOOK[:9], 20))
    grown = Document("grown", BOOK[:9]).request(segment_size=4, prefix_caching=True)
    grown.append_output_token_ids(list(longer.prompt[9:]))
    simulation = simulate([longer], slots=1, budget=5, generation_policy="open")
    waits = []
    for _ in range(3):
        simulation.step()
        simulation.scheduler._find_leaders(list(simulation.scheduler._documents()))
        waits.append(simulation.scheduler._follows_leader(grown))
    assert waits == [True, False, False], "it can have the second segment, but not the third"


def test_a_prompt_that_may_still_grow_is_refused_where_its_end_matters(monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "error", lambda message, *args: lines.append(message % args))
    documents = [Document("streams", BOOK[:9], max_tokens=9, streams_input=True), Document("plain", BOOK[:9])]
    simulation = simulate(documents, generation_policy="open").run()
    assert simulation.finish_reasons == {"streams": FinishReason.ERROR, "plain": FinishReason.LENGTH}
    (line,) = lines
    assert "Send the prompt in one piece" in line


def test_learned_positions_that_grow_end_a_segment_that_stays_open():
    config = vllm_config(segment_size=4, slots=4, budget=64)
    config.model_config.hf_config = ARMTConfig(
        base_model_config={"model_type": "gpt2", "n_positions": 64},
        segment_size=4,
        num_mem_tokens=1,
        d_mem=1,
        generation_policy="open",
    )
    # twelve segments of five positions are behind the last one: four are left, which its prompt takes
    documents = [Document("full", BOOK[:52], max_tokens=9), Document("room", BOOK[:47], max_tokens=9)]
    simulation = Simulation(make_scheduler(config, 64, prefix_caching=False), documents).run()
    assert {name: len(tokens) for name, tokens in simulation.outputs.items()} == {"full": 1, "room": 7}


def test_a_text_of_the_greatest_length_fits_the_table_however_its_segments_lie():
    # 1 + 4 tokens and six more: four columns, of which three would hold eleven tokens
    document = Document("long", BOOK[:5], max_tokens=30)
    simulation = simulate(
        [document], generation_policy="open", segment_alignment="right", prefix_caching=False, max_model_len=12
    ).run()
    assert len(simulation.outputs["long"]) == 7


@pytest.mark.parametrize(
    ("alignment", "prompt", "steps"),
    [("left", 10, [10]), ("right", 10, [2, 8]), ("right", 12, [12]), ("center", 9, [3, 3, 3]), ("center", 12, [12])],
)
def test_a_short_segment_is_closed_in_a_step_of_its_own(alignment, prompt, steps):
    document = Document("a", BOOK[:prompt])
    simulation = simulate([document], generation_policy="open", segment_alignment=alignment, prefix_caching=False)
    assert [step["a"] for step in simulation.run().steps if step] == steps


def test_what_a_short_segment_leaves_of_a_step_goes_to_others():
    documents = [Document("short", BOOK[:9]), Document("whole", OTHER[:80])]
    simulation = simulate(
        documents, budget=16, generation_policy="open", segment_alignment="center", prefix_caching=False
    ).run()
    assert simulation.steps[1] == {"short": 3, "whole": 12}
