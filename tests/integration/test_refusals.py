"""Requests that can't be served end with a sentence; the others go on."""

from __future__ import annotations

from tests.support.engines import engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.memories import asking
from tests.support.small_model import GOLDEN, random_prompt


def test_a_server_without_memories_does_not_answer_as_if_there_were_one(golden_directory):
    with engine(golden_directory(GOLDEN)) as llm:
        assert type(scheduler_of(llm)).__name__ == "SegmentScheduler"
        params = [asking(3, memory="text"), greedy(3), asking(3, save_memory="text"), asking(3, other=1)]
        outputs = generate(llm, [random_prompt(20)] * 4, params)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "error", "length"]
        assert outputs[0].outputs[0].stop_reason == (
            "The request has memory, but this server keeps no memories. Start it with "
            """--additional-config '{"armt": {"memories": "DIR"}}'."""
        )
        # nothing but a refusal is left to be done
        (alone,) = generate(llm, [random_prompt(20)], asking(3, memory="text"))
        assert alone.outputs[0].finish_reason == "error"
        assert pages_in_use(llm) == 0
        assert not scheduler_of(llm).has_requests()
