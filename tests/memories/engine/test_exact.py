"""What follows a memory is what follows its text: every system, every length, read at once and in pieces."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.v1.core.sched.output import SchedulerOutput

from tests.support.engines import engine, generate, greedy, pages_in_use, recorded_preemptions, scheduler_of
from tests.support.memories import (
    Made,
    ask,
    asking,
    check_nothing_is_left,
    distance,
    ids,
    info,
    memory_engine,
    refusal,
    save,
    store_of,
    tolerance,
)
from tests.support.small_hf import IL08, S, Small

OPEN = {"generation_policy": "open"}
KINDS = [
    Small("armt", "llama"),
    Small("armt", "qwen2", {"n_heads": 2, "gating": True, "use_denom": False}),
    Small("armt", "gpt2", {"variant": "v1", "wrap_pos": True, "sliding_window": True}),
    Small("armt", "llama", OPEN | {"variant": "v1"}),
    Small("armt_sw", "llama", {"use_sink": True}),
    Small("armt_sw", "mistral", {"use_sink": True} | IL08),
    Small("prmt", "gpt2", {"wrap_pos": True}),
    Small("prmt", "llama", OPEN | {"aliased": False}),
    Small("rmt", "qwen3"),
    Small("rmt", "gpt2", {"wrap_pos": True, "sliding_window": True}),
    Small("rmt", "gpt2", OPEN | {"wrap_pos": True}),
]
"""Every system and both policies, and between them every option that changes what flows from segment to segment."""
LENGTHS = [3 * S, 3 * S + 1, 4 * S - 1, S, S + 2, 3]
QUESTIONS = [ids(length, 100 + length) for length in (1, S, 2 * S + 3)]
NEW = S + 2


def documents() -> dict[str, list[int]]:
    return {f"of-{length}": ids(length, length) for length in LENGTHS}


def plain(llm: LLM) -> list[RequestOutput]:
    """Each document with each question behind it, as one prompt."""
    return generate(llm, [text + question for text in documents().values() for question in QUESTIONS], greedy(NEW))


def by_memory(llm: LLM) -> list[RequestOutput]:
    """Each question behind the memory of each document, all at once."""
    questions = [(name, question) for name in documents() for question in QUESTIONS]
    return generate(llm, [question for _, question in questions], [asking(NEW, memory=name) for name, _ in questions])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_memory_is_worth_its_text(kind: Small, made: Made, tmp_path: Path) -> None:
    directory = made(kind)
    with engine(directory, max_num_batched_tokens=24, schedule="sequential", enable_prefix_caching=False) as llm:
        otherwise = plain(llm)
    with memory_engine(directory, tmp_path) as llm:
        expected = plain(llm)
        allowed = tolerance(expected, otherwise)
        saved = generate(
            llm,
            list(documents().values()),
            [asking(1, save_memory={"name": name, "after": "prompt"}) for name in documents()],
        )
        for output, text in zip(saved, documents().values(), strict=True):
            assert info(output)["saved"]["tokens"] == len(text)
        assert distance(by_memory(llm), expected) <= allowed
        for name, text in documents().items():
            if len(text) > 2 * S:
                # in pieces that end inside a segment and on its end; the same text leaves the same page
                for begin, end in ((0, S + 3), (S + 3, 2 * S), (2 * S, len(text))):
                    behind = {"memory": "pieces"} if begin else {}
                    save(llm, text[begin:end], "pieces", **behind)
                whole, pieces = (store_of(llm).get(each) for each in (name, "pieces"))
                assert pieces.boundary == whole.boundary
                store_of(llm).delete("pieces")
        assert pages_in_use(llm) == 0
    # the files are all that a new engine has
    with memory_engine(directory, tmp_path, enable_prefix_caching=False, max_num_batched_tokens=24) as llm:
        assert distance(by_memory(llm), expected) <= allowed
        assert pages_in_use(llm) == 0


def preempt_all_now_and_then(llm: LLM, every: int = 7) -> None:
    """Let the scheduler preempt all requests before every so many steps, in turn for want of pages and to forget all.

    In the first way what a step that still runs will generate counts; in the second it is dropped.
    """
    scheduler, steps = scheduler_of(llm), count(1)
    schedule = scheduler.schedule

    def preempt_and_schedule(*args: Any, **kwargs: Any) -> SchedulerOutput:
        step = next(steps)
        if step % (2 * every) == 0:
            while scheduler.running:
                scheduler._preempt_request(scheduler.running.pop(), time.monotonic())
            scheduler.prev_step_scheduled_req_ids.clear()
        elif step % every == 0:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    scheduler.schedule = preempt_and_schedule  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "overlapping", "caching"),
    [(KINDS[0], False, True), (KINDS[0], True, False), (KINDS[3], True, True), (KINDS[4], False, False)],
    ids=str,
)
def test_preempted_requests_resume_behind_their_memory(
    kind: Small, overlapping: bool, caching: bool, made: Made, tmp_path: Path
) -> None:
    directory = made(kind)
    with memory_engine(
        directory,
        tmp_path,
        overlapping=overlapping,
        enable_prefix_caching=caching,
        num_gpu_blocks_override=14,
    ) as llm:
        assert type(scheduler_of(llm)).__name__ == ("AsyncMemoryScheduler" if overlapping else "MemoryScheduler")
        text = ids(3 * S + 5, 1)
        questions = [ids(length, length) for length in (5, 3, 9, 20, 7, 2, S, 30, 2 * S, 4)]
        whole = [text + question for question in questions]
        expected = [generate(llm, [prompt], greedy(3 * S))[0] for prompt in whole]
        otherwise = generate(llm, whole, greedy(3 * S))
        save(llm, text, "text")
        preempt_all_now_and_then(llm)
        preempted_too = generate(llm, whole, greedy(3 * S))
        allowed = tolerance(expected, otherwise, preempted_too)
        preempted = recorded_preemptions(llm)
        outputs = ask(llm, questions, 3 * S, memory="text", save_memory={"name": None})
        assert len(preempted) > len(questions)
        assert distance(outputs, expected) <= allowed
        # and so does what they have saved
        said = [prompt + list(output.outputs[0].token_ids) for prompt, output in zip(whole, outputs, strict=True)]
        more = [prompt + ids(3, 3) for prompt in said]
        later = [generate(llm, [prompt], greedy(S))[0] for prompt in more]
        schedules = [later, *(generate(llm, more, greedy(S)) for _ in range(3))]
        behind = [ask(llm, [ids(3, 3)], S, memory=info(output)["saved"]["id"])[0] for output in outputs]
        assert distance(behind, later) <= tolerance(*schedules)
        check_nothing_is_left(llm)


def test_requests_on_one_memory_share_its_page(made: Made, tmp_path: Path) -> None:
    with memory_engine(made(KINDS[0]), tmp_path) as llm:
        save(llm, ids(3 * S, 1), "text")
        first, *others = ask(llm, [ids(5, n) for n in range(8)], memory="text")
        scheduler = scheduler_of(llm)
        # one is brought, and the others find it in the pool
        stats = scheduler.connector_prefix_cache_stats
        assert stats is None or stats.hits <= S
        # what was sent is counted, and nothing of it was cached
        assert len(first.prompt_token_ids) == 5
        assert {output.num_cached_tokens for output in (first, *others)} == {0}


def test_clients_that_skip_the_prefix_cache_have_the_memory_all_the_same(made: Made, tmp_path: Path) -> None:
    with memory_engine(made(KINDS[0]), tmp_path) as llm:
        save(llm, ids(3 * S, 1), "text")
        params = asking(6, memory="text")
        params.skip_reading_prefix_cache = True
        (skipping,) = generate(llm, [ids(5, 2)], params)
        assert distance([skipping], generate(llm, [ids(3 * S, 1) + ids(5, 2)], greedy(6))) <= 1e-5


def test_memories_in_bfloat16_are_others_than_those_in_float32(made: Made, tmp_path: Path) -> None:
    directory, whole = made(KINDS[0]), [ids(3 * S + 2, 1) + question for question in QUESTIONS]
    with engine(directory, dtype="bfloat16", max_num_batched_tokens=24, schedule="sequential") as llm:
        otherwise = generate(llm, whole, greedy(NEW))
    with memory_engine(directory, tmp_path, dtype="bfloat16") as llm:
        expected = generate(llm, whole, greedy(NEW))
        save(llm, ids(3 * S + 2, 1), "text")
        assert distance(ask(llm, QUESTIONS, NEW, memory="text"), expected) <= tolerance(expected, otherwise)
    with memory_engine(directory, tmp_path) as llm:
        (output,) = ask(llm, QUESTIONS[:1], memory="text")
        status, reason = refusal(output)
        assert status == 409
        assert "dtype is 'bfloat16' there, 'float32' here" in reason


def test_turns_behind_a_memory_are_cached_like_others(made: Made, tmp_path: Path) -> None:
    with memory_engine(made(KINDS[0]), tmp_path) as llm:
        save(llm, ids(3 * S + 2, 1), "text")
        question = ids(3 * S, 2)
        (before,) = ask(llm, [question], memory="text")
        (again,) = ask(llm, [question], memory="text")
        assert again.num_cached_tokens > 0
        assert distance([before], [again]) <= 1e-5
        # the ids of a memory's last segment, sent by somebody as text, are another text
        (other,) = generate(llm, [ids(3 * S, 1)[2 * S :] + question], greedy(6))
        assert other.num_cached_tokens == 0
