"""What is saved: prompts, answers, appends; under which name, and what the response says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from vllm import LLM

from tests.support.engines import generate, greedy
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
)
from tests.support.small_hf import S, Small

KINDS = [Small("armt", "llama"), Small("rmt", "llama", {"generation_policy": "open"})]

MAX_MODEL_LEN = 128


@pytest.fixture(scope="module", params=[(0, False), (0, True), (1, False), (1, True)], ids=str)
def llm(request: pytest.FixtureRequest, made: Made) -> Iterator[LLM]:
    """Engines that commit or leave open what they generate, with and without overlapping steps."""
    kind, overlapping = request.param
    directory = made(KINDS[kind])
    options = {"overlapping": overlapping, "max_model_len": MAX_MODEL_LEN}
    with memory_engine(directory, directory.parent / "memories", **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    check_nothing_is_left(llm)
    for memory in store_of(llm).list(limit=1000)[0]:
        store_of(llm).delete(memory.id)


@pytest.mark.parametrize("length", [1, S - 2, S, 3 * S - 1, 3 * S, 3 * S + 1])
@pytest.mark.parametrize("new", [1, S, 2 * S + 3])
def test_a_conversation_with_its_answer_becomes_a_memory(llm: LLM, length: int, new: int) -> None:
    (said,) = ask(llm, [ids(length, 1)], new, save_memory="talk")
    whole = ids(length, 1) + list(said.outputs[0].token_ids)
    assert info(said)["saved"]["tokens"] == len(whole)
    memory = store_of(llm).get("talk")
    assert (*memory.last, *memory.pending) == tuple(whole[-(len(memory.last) + len(memory.pending)) :])
    # the next turn, saved as well, and one more
    for turn in (3, S):
        expected = generate(llm, [whole + ids(turn, turn)], greedy(new))
        outputs = ask(llm, [ids(turn, turn)], new, memory="talk", save_memory={})
        assert distance(outputs, expected) <= 2e-5
        whole += ids(turn, turn) + list(outputs[0].outputs[0].token_ids)
        assert info(outputs[0])["saved"] == info(outputs[0])["saved"] | {"name": "talk", "tokens": len(whole)}
    assert store_of(llm).get("talk").parent is not None


def test_a_stop_token_may_be_left_to_the_next_turn(llm: LLM) -> None:
    prompt = ids(2 * S + 1, 5)
    (free,) = generate(llm, [prompt], greedy(4))
    stop = free.outputs[0].token_ids[0]
    for include in (True, False):
        params = asking(4, save_memory={"name": f"stopped-{include}", "include_stop_token": include})
        params.stop_token_ids = [stop]
        (output,) = generate(llm, [prompt], params)
        assert output.outputs[0].finish_reason == "stop"
        memory = store_of(llm).get(f"stopped-{include}")
        assert memory.tokens == len(prompt) + include
        assert (stop in memory.pending[-1:]) == include


def test_what_is_saved_of_a_prompt_does_not_wait_for_its_answer(llm: LLM) -> None:
    (output,) = ask(llm, [ids(3 * S + 1, 2)], 2 * S, save_memory={"name": "text", "after": "prompt"})
    assert len(output.outputs[0].token_ids) == 2 * S
    assert info(output)["saved"]["tokens"] == 3 * S + 1


def test_everything_of_a_memory_can_be_given_with_the_request(llm: LLM) -> None:
    options = {
        "name": "full",
        "metadata": {"kind": "novel"},
        "roles": ["user", "assistant"],
        "expires_after": {"anchor": "last_used_at", "seconds": 60},
    }
    (output,) = ask(llm, [ids(S + 1, 3)], 2, save_memory=json.dumps(options))
    memory = store_of(llm).get("full")
    assert info(output)["saved"]["id"] == memory.id
    assert (memory.metadata, memory.roles) == ({"kind": "novel"}, ("user", "assistant"))
    assert memory.expires_after is not None
    # an append has them too, unless it says otherwise
    ask(llm, [ids(3, 3)], 2, memory="full", save_memory={"metadata": {"kind": "play"}})
    later = store_of(llm).get("full")
    assert (later.metadata, later.roles, later.parent) == ({"kind": "play"}, memory.roles, memory.id)
    # another name leaves the old memory its own
    ask(llm, [ids(3, 3)], 2, memory="full", save_memory="fork")
    assert store_of(llm).get("full").id == later.id
    assert store_of(llm).get("fork").parent == later.id


def test_tenants_do_not_see_each_other(llm: LLM) -> None:
    def prompt(text: list[int], salt: str | None) -> dict:
        return {"prompt_token_ids": text} | ({} if salt is None else {"cache_salt": salt})

    text, question = ids(2 * S + 1, 7), ids(3, 8)
    llm.generate(prompt(text, "mine"), asking(1, save_memory={"name": "text", "after": "prompt"}), use_tqdm=False)
    for salt in (None, "yours"):
        (other,) = llm.generate(prompt(question, salt), asking(2, memory="text"), use_tqdm=False)
        assert refusal(other) == (404, "There is no memory 'text'.")
    (mine,) = llm.generate(prompt(question, "mine"), asking(6, memory="text"), use_tqdm=False)
    assert distance([mine], generate(llm, [text + question], greedy(6))) <= 1e-5
    store_of(llm).delete("text", salt="mine")


def test_requests_that_ask_for_too_much_are_refused_in_words(llm: LLM) -> None:
    save(llm, ids(2 * S, 9), "text")
    save(llm, ids(2 * S, 9), "other")
    with_prompt_logprobs = asking(2, memory="text")
    with_prompt_logprobs.prompt_logprobs = 1
    refused = {
        "prompt_logprobs can't be had": with_prompt_logprobs,
        "There is no memory 'nothing'": asking(2, memory="nothing"),
        "can't be the name of a memory": asking(2, memory="../text"),
        "is no id of a memory": asking(2, memory="mem_1"),
        "must be a text": asking(2, memory=3),
        "memory_skip is -1": asking(2, memory="text", memory_skip=-1),
        "Nothing is left of the prompt": asking(2, memory="text", memory_skip=3),
        "give `memory`, too": asking(2, memory_skip=3),
        "save_memory must be a name or an object": asking(2, save_memory={"nmae": "x"}),
        "save_memory.if_parent compares": asking(2, save_memory={"if_parent": "mem_1"}),
        "Somebody was faster": asking(2, memory="text", save_memory={"if_parent": "mem_1"}),
        "The name 'other' is taken": asking(2, memory="text", save_memory="other"),
        "build_memory is given alone": asking(2, build_memory="text", memory="text"),
    }
    outputs = generate(llm, [ids(3, 1)] * len(refused), list(refused.values()))
    for output, words in zip(outputs, refused, strict=True):
        status, reason = refusal(output)
        assert words in reason
        assert 400 <= status < 500
    (long,) = ask(llm, [ids(MAX_MODEL_LEN - S, 1)], 2, memory="text")
    assert refusal(long)[0] == 400
    assert "fewer than max_model_len" in refusal(long)[1]
    (good,) = ask(llm, [ids(3, 1)], 2, memory="text")
    assert good.outputs[0].finish_reason == "length"


def test_of_two_that_take_one_name_the_second_is_told(llm: LLM) -> None:
    outputs = ask(llm, [ids(S + 1, n) for n in range(3)], 2, save_memory="same")
    saved = [info(output)["saved"] for output in outputs]
    assert sorted("error" in each for each in saved) == [False, True, True]
    assert {each["status"] for each in saved if "error" in each} == {409}
    # all have their answers
    assert {len(output.outputs[0].token_ids) for output in outputs} == {2}


def test_an_aborted_request_saves_no_answer(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("gone", {"prompt_token_ids": ids(S + 1, 1)}, asking(50, save_memory="gone"))
    for _ in range(4):
        engine.step()
    engine.abort_request(["gone"])
    (other,) = ask(llm, [ids(S + 1, 2)], 2, save_memory="kept")
    assert "error" not in info(other)["saved"]
    assert [memory.name for memory in store_of(llm).list()[0]] == ["kept"]


def test_first_tokens_that_stand_for_the_memory_are_skipped(llm: LLM) -> None:
    save(llm, ids(2 * S + 2, 4), "text")
    question = ids(5, 5)
    (output,) = ask(llm, [ids(7, 6) + question], memory="text", memory_skip=7)
    assert distance([output], ask(llm, [question], memory="text")) == 0
    # more than the memory puts in front
    save(llm, ids(2, 4), "short")
    (output,) = ask(llm, [ids(7, 6) + question], memory="short", memory_skip=7)
    assert distance([output], ask(llm, [question], memory="short")) == 0
