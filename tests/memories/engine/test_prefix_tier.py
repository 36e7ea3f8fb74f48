"""The prefix cache's second tier: texts that begin alike go on from what another engine has read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engines import engine, generate, greedy, scheduler_of
from tests.support.memories import (
    Made,
    admission_of,
    ask,
    check_nothing_is_left,
    distance,
    ids,
    memory_engine,
    save,
    store_of,
    tolerance,
)
from tests.support.small_hf import S, Small

COMMIT, OPEN = Small("armt", "llama"), Small("rmt", "llama", {"generation_policy": "open"})
LENGTHS = [7 * S + 3, 4 * S, 4 * S + 1, S + 1, S, 3]
TEXTS = [ids(length, length) for length in LENGTHS]
MORE = [TEXTS[0] + ids(2 * S + 5, 5), TEXTS[1] + ids(3, 6)]


@pytest.mark.parametrize(
    ("kind", "caching", "overlapping"), [(COMMIT, True, False), (COMMIT, False, True), (OPEN, True, True)], ids=str
)
def test_another_engine_goes_on_where_one_has_stopped(
    kind: Small, caching: bool, overlapping: bool, made: Made, tmp_path: Path
) -> None:
    directory, folder = made(kind), f"{tmp_path},prefix"
    with engine(directory, max_num_batched_tokens=24, schedule="sequential") as llm:
        expected = generate(llm, TEXTS + MORE, greedy(6))
    with memory_engine(directory, folder) as llm:
        generate(llm, TEXTS, greedy(1))
    with memory_engine(directory, folder, enable_prefix_caching=caching, overlapping=overlapping) as llm:
        outputs = generate(llm, TEXTS + MORE, greedy(6))
        # one token of a prompt has to be computed, and "open" leaves its last segment open
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [7 * S, 3 * S, 4 * S, S, 0, 0, 7 * S, 4 * S if kind is COMMIT else 3 * S]
        with_engine = tolerance(expected, generate(llm, TEXTS + MORE, greedy(6)))
        assert distance(outputs, expected) <= max(with_engine, 2e-5)
        check_nothing_is_left(llm)


def test_a_prompt_goes_on_from_the_page_of_a_memory_that_it_begins_with(made: Made, tmp_path: Path) -> None:
    directory, folder = made(COMMIT), f"{tmp_path},prefix"
    with memory_engine(directory, tmp_path) as llm:
        save(llm, TEXTS[0], "text")
    with memory_engine(directory, folder) as llm:
        (output,) = generate(llm, [TEXTS[0] + [1]], greedy(4))
        assert output.num_cached_tokens == 7 * S
        assert distance([output], ask(llm, [[1]], 4, memory="text")) <= 2e-5
        # what is behind a memory is not kept as if it were an ordinary prompt
        before = len(store_of(llm).prefix.entries())
        ask(llm, [ids(5 * S, 77)], 4, memory="text")
        assert len(store_of(llm).prefix.entries()) == before


def test_tenants_do_not_go_on_from_each_others_texts(made: Made, tmp_path: Path) -> None:
    directory, folder = made(COMMIT), f"{tmp_path},prefix"
    for salt, cached in (("mine", 0), ("yours", 0), (None, 0), ("mine", 7 * S)):
        with memory_engine(directory, folder) as llm:
            prompt = {"prompt_token_ids": TEXTS[0]} | ({} if salt is None else {"cache_salt": salt})
            (output,) = llm.generate(prompt, greedy(1), use_tqdm=False)
            assert output.num_cached_tokens == cached


@pytest.mark.parametrize("damage", [lambda page: page.write_bytes(b"no page"), Path.unlink], ids=["damaged", "gone"])
def test_a_prefix_that_can_not_be_read_is_computed(
    damage: Callable[[Path], object], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, folder = made(COMMIT), f"{tmp_path},prefix"
    with memory_engine(directory, folder) as llm:
        expected = generate(llm, [TEXTS[0]], greedy(6))
    with memory_engine(directory, folder) as llm:
        matched = admission_of(llm).matched_tokens

        def damage_and_match(request, computed):
            for entry in store_of(llm).prefix.entries():
                if entry.path.stat().st_size > 100:
                    damage(entry.path)
            return matched(request, computed)

        admission_of(llm).matched_tokens = damage_and_match  # type: ignore[method-assign]
        (output,) = generate(llm, [TEXTS[0]], greedy(6))
        assert output.num_cached_tokens == 0
        assert distance([output], expected) <= 2e-5
        assert not scheduler_of(llm).requests


def test_prefixes_are_evicted_for_what_is_newer(made: Made, tmp_path: Path) -> None:
    directory, folder = made(COMMIT), f"{tmp_path},prefix"
    with memory_engine(directory, folder) as llm:
        generate(llm, [TEXTS[2]], greedy(1))
    with memory_engine(directory, folder) as llm:
        page_bytes = store_of(llm).prefix.entries()[0].bytes
    with memory_engine(directory, folder, memories_max_bytes=3 * page_bytes) as llm:
        generate(llm, [ids(2 * S + 1, 200 + n) for n in range(9)], greedy(1))
    with memory_engine(directory, folder) as llm:
        assert len(store_of(llm).prefix.entries()) == 3
        (last,) = generate(llm, [ids(2 * S + 1, 208)], greedy(1))
        assert last.num_cached_tokens == 2 * S
