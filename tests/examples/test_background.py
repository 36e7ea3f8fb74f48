"""The books: each in one part, and written once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest

from examples import background


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    books = {f"book-{i:02}": f"This is book {i}." for i in range(23)}
    monkeypatch.setattr(background, "books", lambda: books)
    return books


def parts(directory: Path) -> dict[str, dict[str, str]]:
    found = sorted(directory.iterdir())
    return {part.name: {file.stem: file.read_text() for file in part.glob("*.txt")} for part in found}


def test_every_book_is_in_one_part(books, tmp_path: Path) -> None:
    found = parts(background.fetch(tmp_path / "text"))
    assert found.keys() == {"train", "validation", "test"}
    assert sum(len(part) for part in found.values()) == len(books)
    assert found["train"] | found["validation"] | found["test"] == books
    assert len(found["train"]) > 2 * len(found["test"]) > 0
    assert len(found["validation"]) > 0


def test_what_is_there_already_is_left(books, tmp_path: Path) -> None:
    background.fetch(tmp_path / "text")
    (tmp_path / "text" / "train" / "mine.txt").write_text("Mine.")
    background.fetch(tmp_path / "text")
    assert parts(tmp_path / "text")["train"]["mine"] == "Mine."


def test_nothing_is_left_of_a_fetch_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails() -> dict[str, str]:
        raise OSError("no network")

    monkeypatch.setattr(background, "books", fails)
    with pytest.raises(OSError, match="no network"):
        background.fetch(tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == [".text.lock"]


def test_of_two_that_fetch_at_once_one_does(books, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = Barrier(2)
    calls: list[None] = []

    def slow() -> dict[str, str]:
        calls.append(None)
        sleep(0.1)  # so that the other one finds the directory missing as well
        return books

    def fetch() -> Path:
        begun.wait()
        return background.fetch(tmp_path / "text")

    monkeypatch.setattr(background, "books", slow)
    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(fetch) for _ in range(2)]]
    assert found == [tmp_path / "text"] * 2
    assert len(calls) == 1
