"""The books: each in one part, and written once."""

from __future__ import annotations

from pathlib import Path

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
    assert list(tmp_path.iterdir()) == []
