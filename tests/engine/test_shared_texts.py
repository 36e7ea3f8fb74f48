"""Texts that begin alike, sent as clients send them: aborted, at once, edited, behind a stop, under salts, in a hurry.

Each is computed as by an engine that has read nothing before, and what is not read again is counted by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.support.engines import decoded_log_probs, engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.golden_cases import relative_l2
from tests.support.small_model import GOLDEN, S, random_prompt

STEP = 8 * S
"""Tokens of a step."""
STOP = 7


@pytest.fixture(scope="module", params=[False, True], ids=["one step at a time", "overlapping steps"])
def shared(request, golden_directory) -> Iterator[LLM]:
    with engine(
        golden_directory(GOLDEN), overlap=request.param, max_num_batched_tokens=STEP, scheduling_policy="priority"
    ) as llm:
        assert type(scheduler_of(llm)).__name__ == ("AsyncSegmentScheduler" if request.param else "SegmentScheduler")
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The engine, with nothing in its prefix cache; afterwards no page is held."""
    forget(shared)
    yield shared
    assert pages_in_use(shared) == 0


def forget(llm: LLM) -> None:
    """Empty the prefix cache."""
    # a step that was in flight when its request was aborted is processed by the next
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert scheduler_of(llm).reset_prefix_cache(), "pages are held"


def cold(llm: LLM, prompt: list[int], params: SamplingParams) -> RequestOutput:
    """What is answered where nothing was read before."""
    forget(llm)
    (output,) = generate(llm, [prompt], params)
    assert output.num_cached_tokens == 0
    forget(llm)
    return output


def assert_same(actual: RequestOutput, expected: RequestOutput) -> None:
    assert actual.prompt_token_ids == expected.prompt_token_ids
    assert actual.outputs[0].token_ids == expected.outputs[0].token_ids
    assert relative_l2(decoded_log_probs(actual), decoded_log_probs(expected)) < 1e-4


def answer(llm: LLM, prompt: list[int], name: str = "") -> RequestOutput:
    """Send a request to an engine that may have others, and wait for its end."""
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, greedy(6))
    while True:
        for output in llm.llm_engine.step():
            if output.finished and output.request_id == name:
                return output


def test_a_text_that_was_aborted_is_read_as_if_it_had_never_been_sent(llm: LLM) -> None:
    """Ten times each at another moment: while it waits, is read, has just been read, and decodes."""
    known = set()
    for text in range(5):
        document = random_prompt((30 + text) * S + 3 * text, seed=text)
        prompt = document + random_prompt(7 + text, seed=99)
        expected = cold(llm, prompt, greedy(6))
        for steps in range(10):
            llm.llm_engine.add_request("doomed", {"prompt_token_ids": document}, greedy(9))
            for _ in range(steps):
                llm.llm_engine.step()
            llm.llm_engine.abort_request(["doomed"])
            output = answer(llm, prompt, f"{text} after {steps}")
            assert_same(output, expected)
            known.add(output.num_cached_tokens)
            forget(llm)
    # from nothing over memories in the middle to all of it
    assert known >= {0, 30 * S}
    assert len(known) > 6


@pytest.mark.parametrize("k", [1, 5, 11])
def test_texts_that_part_behind_whole_segments_are_each_as_alone(llm: LLM, k: int) -> None:
    common = random_prompt(k * S)
    prompts = [common + random_prompt(S + 3, seed=seed) for seed in (1, 2)]
    expected = [cold(llm, prompt, greedy(20)) for prompt in prompts]
    outputs = generate(llm, prompts, greedy(20))
    for output, alone in zip(outputs, expected, strict=True):
        assert_same(output, alone)
    assert sorted(output.num_cached_tokens for output in outputs) == [0, k * S]


@pytest.mark.parametrize(("length", "known"), [(4 * S - 1, 3 * S), (4 * S, 3 * S), (4 * S + 1, 4 * S), (S, 0), (1, 0)])
def test_a_text_sent_twice_reads_what_its_last_whole_segment_leaves(llm: LLM, length: int, known: int) -> None:
    prompt = random_prompt(length)
    first, second = (generate(llm, [prompt], greedy(S))[0] for _ in range(2))
    assert_same(second, first)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, known)


def test_a_text_beside_a_longer_one_and_once_more_alone(llm: LLM) -> None:
    text, more = random_prompt(9 * S + 5), random_prompt(3 * S, seed=1)
    expected = [cold(llm, prompt, greedy(9)) for prompt in (text, text + more)]
    together = generate(llm, [text, text + more], greedy(9))
    again = generate(llm, [text], greedy(9))
    for output, alone in zip([*together, *again], [*expected, expected[0]], strict=True):
        assert_same(output, alone)
    # the longer one waits for the memory that the other leaves behind its last whole segment
    assert [output.num_cached_tokens for output in [*together, *again]] == [0, 9 * S, 9 * S]


@pytest.mark.parametrize("end", [3 * S - 1, 3 * S, 3 * S + 1, 4 * S + 5])
def test_a_text_goes_on_behind_a_stop_as_if_read_anew(llm: LLM, end: int) -> None:
    """The stop token is the `end`-th of the text; up to it `min_tokens` forbids it, over a boundary."""
    prompt = random_prompt(S + 6)
    params = greedy(end, min_tokens=end - len(prompt) - 1, stop_token_ids=[STOP], logit_bias={STOP: 100})
    (stopped,) = generate(llm, [prompt], params)
    (completion,) = stopped.outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", STOP)
    text = prompt + list(completion.token_ids)
    assert (len(text), text[-1], text.count(STOP) - prompt.count(STOP)) == (end, STOP, 1)
    followed = [*text, *random_prompt(2, seed=5)]
    (output,) = generate(llm, [followed], greedy(2 * S))
    # the stop token itself is never read in the first request, or only in a step that does not count
    assert output.num_cached_tokens == (end - 1) // S * S
    assert_same(output, cold(llm, followed, greedy(2 * S)))


def test_a_conversation_whose_earlier_turn_was_edited_goes_on_from_before_it(llm: LLM) -> None:
    """As by a template that strips what a turn thought aloud, or by a user who writes another question."""
    first, second = random_prompt(5 * S + 3), random_prompt(9, seed=1)
    (said,) = generate(llm, [first], greedy(3 * S))
    thought = list(said.outputs[0].token_ids)
    whole = first + thought + second
    (again,) = generate(llm, [whole], greedy(S))
    # 5 S + 3 + 3 S tokens, without the last one, which nobody has read
    assert again.num_cached_tokens == 8 * S
    whole += list(again.outputs[0].token_ids)
    third = random_prompt(11, seed=2)
    stripped = first + thought[-5:] + second + third
    edited = first + thought + random_prompt(9, seed=3) + third
    outputs = [generate(llm, [text], greedy(S))[0] for text in (stripped, edited)]
    assert [output.num_cached_tokens for output in outputs] == [5 * S, 8 * S]
    for output in outputs:
        assert_same(output, cold(llm, list(output.prompt_token_ids or ()), greedy(S)))


@pytest.mark.parametrize("at_once", [False, True])
def test_salted_texts_share_nothing_and_are_answered_alike(llm: LLM, at_once: bool) -> None:
    prompt = random_prompt(6 * S + 2)
    requests = [{"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("a", "b", "a")]
    calls = [requests[:2], requests[2:]] if at_once else [[request] for request in requests]
    outputs = [output for call in calls for output in llm.generate(call, greedy(9), use_tqdm=False)]  # type: ignore[arg-type]
    expected = cold(llm, prompt, greedy(9))
    for output in outputs:
        assert_same(output, expected)
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 6 * S]


def test_an_urgent_question_is_answered_while_a_long_text_is_read(llm: LLM) -> None:
    document, question = random_prompt(300 * S + 7), random_prompt(2 * S + 5, seed=1)
    expected = [cold(llm, prompt, greedy(6)) for prompt in (document, question)]
    llm.llm_engine.add_request("long", {"prompt_token_ids": document}, greedy(6), priority=1)
    for _ in range(5):
        assert not llm.llm_engine.step()
    llm.llm_engine.add_request("urgent", {"prompt_token_ids": question}, greedy(6), priority=0)
    finished: dict[str, RequestOutput] = {}
    steps = first = 0
    while len(finished) < 2:
        steps += 1
        for output in llm.llm_engine.step():
            first = first or steps
            if output.finished:
                finished[output.request_id] = output
    # as many steps as it takes to be read and processed; the long text takes forty
    assert first <= 3
    assert list(finished) == ["urgent", "long"]
    for name, alone in zip(("long", "urgent"), expected, strict=True):
        assert_same(finished[name], alone)
