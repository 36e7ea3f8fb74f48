"""Pages that are damaged or gone, disks that are full: who asked is told, and nobody else notices."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm import LLM, RequestOutput

from tests.support.engines import generate, greedy, scheduler_of
from tests.support.memories import (
    Made,
    admission_of,
    ask,
    asking,
    check_nothing_is_left,
    distance,
    ids,
    info,
    io_of,
    memory_engine,
    refusal,
    save,
    store_of,
)
from tests.support.small_hf import S, Small
from vllm_armt.memories.disk import files

TEXT, QUESTIONS = ids(3 * S + 2, 1), [ids(2 * S, n) for n in (2, 3, 4)]
"""The questions close segments behind the memory, which the prefix cache would keep."""


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapping"])
def llm(request: pytest.FixtureRequest, made: Made) -> Iterator[LLM]:
    directory = made(Small("armt", "llama"))
    with memory_engine(directory, directory.parent / "memories", overlapping=request.param) as llm:
        yield llm


@pytest.fixture
def page(llm: LLM) -> Iterator[Path]:
    """The page of the memory "text", which the pool has not."""
    save(llm, TEXT, "text")
    scheduler_of(llm).reset_prefix_cache()
    memory = store_of(llm).get("text")
    assert memory.page is not None
    yield store_of(llm).pages.path(memory.page)
    store_of(llm).delete("text")
    check_nothing_is_left(llm)


def flip(page: Path) -> None:
    data = bytearray(page.read_bytes())
    data[-5] ^= 1
    page.write_bytes(data)


def cut(page: Path) -> None:
    os.truncate(page, page.stat().st_size // 2)


def remove(page: Path) -> None:
    page.unlink()


@pytest.mark.parametrize(("damage", "words"), [(flip, "checksum"), (cut, "bytes instead of"), (remove, "is gone")])
def test_a_page_that_can_not_be_read_fails_those_who_ask_it_and_nobody_else(
    llm: LLM, page: Path, damage: Callable[[Path], None], words: str
) -> None:
    bystander = ids(2 * S + 1, 9)
    expected = generate(llm, [bystander], greedy(8))
    right = generate(llm, [TEXT + question for question in QUESTIONS], greedy(8))
    whole = page.with_suffix(".whole")
    shutil.copy(page, whole)
    # after it was looked up
    admission = admission_of(llm)
    open_memory = admission.open

    def open_and_damage(request) -> None:
        open_memory(request)
        if request.request_id in admission.sessions and page.exists():
            damage(page)

    admission.open = open_and_damage  # type: ignore[method-assign]
    params = [greedy(8), *(asking(8, memory="text") for _ in QUESTIONS)]
    outputs = generate(llm, [bystander, *QUESTIONS], params)
    admission.open = open_memory  # type: ignore[method-assign]
    assert distance(outputs[:1], expected) <= 1e-5
    for output in outputs[1:]:
        status, reason = refusal(output)
        assert "The memory 'text' can't be used." in reason or "There is no memory" in reason
        assert words in reason
        assert status == 500
    # nothing that was computed from it is left
    os.replace(whole, page)
    again = ask(llm, QUESTIONS, 8, memory="text")
    assert {output.num_cached_tokens for output in again} == {0}
    assert distance(again, right) <= 2e-5


def test_a_damaged_page_does_not_matter_while_the_pool_has_it(llm: LLM, page: Path) -> None:
    (before,) = ask(llm, [QUESTIONS[0]], memory="text")
    flip(page)
    (after,) = ask(llm, [QUESTIONS[0]], memory="text")
    assert distance([before], [after]) <= 2e-5


def test_a_preempted_request_whose_page_is_damaged_meanwhile_fails(llm: LLM, page: Path) -> None:
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    engine.add_request("victim", {"prompt_token_ids": QUESTIONS[0]}, asking(60, memory="text"))
    engine.add_request("other", {"prompt_token_ids": QUESTIONS[1]}, greedy(60))
    finished: dict[str, RequestOutput] = {}
    for step in range(400):
        if step == 20:
            flip(page)
            scheduler.reset_prefix_cache(reset_running_requests=True)
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        if not engine.has_unfinished_requests():
            break
    assert "checksum" in refusal(finished["victim"])[1]
    assert finished["victim"].kv_transfer_params is not None
    assert distance([finished["other"]], generate(llm, [QUESTIONS[1]], greedy(60))) <= 1e-3


def test_a_full_disk_is_told_with_the_answer(llm: LLM, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_all", full)
        outputs = ask(llm, QUESTIONS, 4, save_memory={})
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 4
        assert info(output)["saved"]["status"] == 507
        assert "No room on the disk" in info(output)["saved"]["error"]
    (after,) = ask(llm, QUESTIONS[:1], 4, save_memory={})
    assert "id" in info(after)["saved"]
    store_of(llm).delete(info(after)["saved"]["id"])


def test_an_expired_memory_is_gone(llm: LLM, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"name": "short", "after": "prompt", "expires_after": {"anchor": "created_at", "seconds": 1}}
    ask(llm, [TEXT], 1, save_memory=options)
    with monkeypatch.context() as patched:
        patched.setattr(store_of(llm).catalog, "_clock", lambda: 1e10)
        (output,) = ask(llm, QUESTIONS[:1], memory="short")
    assert refusal(output) == (410, "The memory 'short' has expired.")
    store_of(llm).delete("short")


def test_pages_wait_in_bounds_for_many_memories(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = admission_of(llm).fetches
    monkeypatch.setattr(fetches, "_most", 2)
    texts = [ids(S + 1, 50 + n) for n in range(12)]
    for n, text in enumerate(texts):
        save(llm, text, f"many-{n}")
    scheduler_of(llm).reset_prefix_cache()
    most = 0
    step_starts = io_of(llm).step_starts

    def watch(transfers) -> None:
        nonlocal most
        step_starts(transfers)
        most = max(most, len(io_of(llm)._pages))

    monkeypatch.setattr(io_of(llm), "step_starts", watch)
    outputs = generate(llm, [QUESTIONS[0]] * len(texts), [asking(4, memory=f"many-{n}") for n in range(len(texts))])
    # those that a step has taken over go when it ends
    assert most <= 4
    assert distance(outputs, generate(llm, [text + QUESTIONS[0] for text in texts], greedy(4))) <= 2e-5
    for n in range(len(texts)):
        store_of(llm).delete(f"many-{n}")


def test_who_saves_waits_until_what_others_saved_is_written(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_armt.memories.engine.saving.WRITE_BYTES", 1)
    outputs = ask(llm, [ids(S + 1, n) for n in range(9)], 2, save_memory={})
    assert all("id" in info(output)["saved"] for output in outputs)
    for output in outputs:
        store_of(llm).delete(info(output)["saved"]["id"])
