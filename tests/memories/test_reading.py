"""Texts of any length, read in pieces by an engine that takes short ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.support.engines import engine, generate, greedy, pages_in_use, scheduler_of
from tests.support.memories import ask, distance, ids, info, io_of, memory_engine, save, store_of, tolerance
from tests.support.small_hf import S, Small
from vllm_armt.memories import reading as reading_module
from vllm_armt.memories.disk.manifest import Manifest
from vllm_armt.memories.disk.pages import Pages
from vllm_armt.memories.engine import page_io
from vllm_armt.memories.errors import Conflict, InvalidInput, MemoriesError, NotFound
from vllm_armt.memories.reading import Piece, Reading, read, read_async, read_with

MAX_MODEL_LEN = 6 * S
Expected = tuple[list[RequestOutput], float]
TEXT = ids(40 * S + 3, 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reading") / "model"
    Small("armt", "llama").build().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> Expected:
    """What follows the whole text, and how far from it what follows a memory may be."""
    prompts = [TEXT + ids(5, 2)]
    with engine(directory) as llm:
        outputs = generate(llm, prompts, greedy(6))
    with engine(directory, max_num_batched_tokens=24, schedule="sequential") as llm:
        return outputs, tolerance(outputs, generate(llm, prompts, greedy(6)))


@pytest.fixture(scope="module")
def llm(directory: Path, expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("memories")
    with memory_engine(directory, folder, max_model_len=MAX_MODEL_LEN) as llm:
        yield llm


def reading_of(llm: LLM, *parts: list[int], **options: Any) -> Reading:
    return read(store_of(llm), parts, segment_size=S, max_model_len=MAX_MODEL_LEN, **options)


def after(llm: LLM, reading: Reading, piece: Piece) -> Piece | None:
    """Run a piece; the next one, None if it was the last."""
    try:
        return reading.send(llm.generate(piece.prompt, piece.params, use_tqdm=False)[0])
    except StopIteration:
        return None


class Client:
    """An engine of this process, asked as those of servers are."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.requests: list[str] = []

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> Any:
        self.requests.append(request_id)
        await asyncio.sleep(0)
        for output in self.llm.generate(prompt, params, use_tqdm=False):
            yield output


@pytest.mark.parametrize("piece_tokens", [None, 1, S + 1])
def test_a_text_longer_than_the_engine_takes_is_read_in_pieces(
    llm: LLM, expected: Expected, piece_tokens: int | None
) -> None:
    text = TEXT if piece_tokens != 1 else TEXT[: 3 * S]
    parts = [text[:7], text[7:8], [], text[8:]]
    memory = read_with(llm, reading_of(llm, *parts, piece_tokens=piece_tokens, name="text", total=len(text)))
    assert (memory.status, memory.name, memory.tokens) == ("completed", "text", len(text))
    if text == TEXT:
        assert distance(ask(llm, [ids(5, 2)], memory="text"), expected[0]) <= expected[1]
    else:
        # what a text leaves is the same, however it was cut
        save(llm, text, "at-once")
        assert store_of(llm).get("at-once").boundary == memory.boundary
        store_of(llm).delete("at-once")
    store_of(llm).delete("text")
    assert pages_in_use(llm) == 0


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of pages that are read from the disk from now on."""
    keys: list[str] = []
    load = Pages.load

    def record(self: Pages, key: str, expected: Any) -> Any:
        keys.append(key)
        return load(self, key, expected)

    monkeypatch.setattr(Pages, "load", record)
    return keys


def test_the_next_piece_takes_its_page_over_without_the_disk(
    llm: LLM, expected: Expected, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_with(llm, reading_of(llm, ids(len(TEXT), 10), name="kept"))
    assert loaded == []
    # of two texts whose pieces take turns, where one page is kept, each has to read its own
    monkeypatch.setattr(page_io, "KEPT_BYTES", 0)
    texts = {"text": TEXT, "other": ids(len(TEXT), 11)}
    readings = [reading_of(llm, text, name=name) for name, text in texts.items()]
    pieces: list[Piece | None] = [next(reading) for reading in readings]
    while all(pieces):
        pieces = [after(llm, *turn) for turn in zip(readings, pieces, strict=True)]  # type: ignore[arg-type]
        assert len(io_of(llm)._kept) == 1
    assert len(loaded) >= 10
    assert distance(ask(llm, [ids(5, 2)], memory="text"), expected[0]) <= expected[1]
    for name in ("kept", *texts):
        store_of(llm).delete(name)


def test_who_watches_sees_how_far_it_is(llm: LLM) -> None:
    reading = reading_of(llm, TEXT, name="watched", total=len(TEXT))
    piece: Piece | None = next(reading)
    seen: list[tuple[str, tuple[int, int]]] = []
    while piece is not None:
        memory = store_of(llm).get("watched")
        assert memory.progress is not None
        seen.append((memory.status, memory.progress))
        piece = after(llm, reading, piece)
    assert seen[0] == ("in_progress", (0, len(TEXT)))
    assert seen[0][1] < seen[1][1] < seen[-1][1] < (len(TEXT), len(TEXT))
    store_of(llm).delete("watched")


def test_pieces_grow_until_they_take_seconds(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "FIRST_PIECE_TOKENS", 4)
    monkeypatch.setattr(reading_module, "PIECE_TOKENS", 20)
    now = 0.0
    monkeypatch.setattr(reading_module, "time", SimpleNamespace(monotonic=lambda: now))
    reading = reading_of(llm, TEXT, name="grown")
    piece: Piece | None = next(reading)
    sizes: list[int] = []
    while piece is not None:
        sizes.append(len(piece.prompt["prompt_token_ids"]))
        now += 0.1 if len(sizes) != 2 else 2.5
        piece = after(llm, reading, piece)
    assert sizes[:5] == [4, 8, 8, 16, 20]
    assert sum(sizes) == len(TEXT)
    store_of(llm).delete("grown")


def test_an_append_whose_name_has_moved_is_read_again_behind_the_new_memory(llm: LLM, directory: Path) -> None:
    first = read_with(llm, reading_of(llm, ids(2 * S + 1, 1), name="shared"))
    reading = reading_of(llm, ids(2 * S, 3), parent=first)
    piece: Piece | None = next(reading)
    (between,) = ask(llm, [ids(S, 2)], 1, memory="shared", save_memory={"after": "prompt"})
    assert "id" in info(between)["saved"]
    while piece is not None:
        piece = after(llm, reading, piece)
    memory = store_of(llm).get("shared")
    assert memory.tokens == 2 * S + 1 + S + 2 * S
    with pytest.raises(Conflict):
        read_with(llm, reading_of(llm, ids(3, 3), parent=first, if_parent=first.id))
    for each in store_of(llm).list()[0]:
        store_of(llm).delete(each.id)


def test_tenants_read_for_themselves(llm: LLM) -> None:
    memory = read_with(llm, reading_of(llm, ids(8 * S, 1), name="mine", salt="secret"))
    assert memory.salt is not None
    with pytest.raises(NotFound):
        store_of(llm).get("mine")
    store_of(llm).delete("mine", salt="secret")


def test_a_reading_that_fails_leaves_a_memory_that_says_why(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        read_with(llm, reading_of(llm, [], name="empty"))
    assert store_of(llm).get("empty").status == "failed"
    with pytest.raises(InvalidInput, match="max_model_len is 17"):
        read_with(llm, read(store_of(llm), [TEXT], segment_size=S, max_model_len=2 * S + 1, name="short"))
    reading = reading_of(llm, TEXT, name="left")
    next(reading)
    reading.close()
    assert (store_of(llm).get("left").status, store_of(llm).get("left").error) == ("failed", "It was cancelled.")
    # somebody deletes it meanwhile: its next piece finds nothing to go on from
    reading = reading_of(llm, TEXT, name="deleted")
    piece = next(reading)
    store_of(llm).delete("deleted")
    with pytest.raises(MemoriesError, match="There is no memory") as error:
        after(llm, reading, piece)
    assert error.value.status == 404
    for each in store_of(llm).list()[0]:
        store_of(llm).delete(each.id)
    assert not scheduler_of(llm).requests


def test_a_server_reads_without_blocking_its_loop(llm: LLM, expected: Expected) -> None:
    async def run() -> tuple[Manifest, int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        counting = asyncio.create_task(count())
        client: Any = Client(llm)
        memory = await read_async(client, reading_of(llm, TEXT, name="async"))
        counting.cancel()
        assert len(set(client.requests)) == len(client.requests) > 1
        return memory, turns

    memory, turns = asyncio.run(run())
    assert turns > 10
    assert distance(ask(llm, [ids(5, 2)], memory=memory.id), expected[0]) <= expected[1]
    store_of(llm).delete("async")


def test_a_cancelled_reading_is_over_at_once(llm: LLM) -> None:
    async def run() -> None:
        client: Any = Client(llm)
        task = asyncio.create_task(read_async(client, reading_of(llm, TEXT, name="cancelled")))
        while not client.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert store_of(llm).get("cancelled").status == "failed"
    store_of(llm).delete("cancelled")
