"""Texts as people write them: kinds with parts of their own, and some for the test alone."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from examples import texts

MANUAL = """.\\" a comment
.TH CAT 1
.SH NAME
cat \\- print \\fBfiles\\fP
.SH "SEE ALSO"
.BR tac (1),
.PP
.TP
.I file
A \\(aqname\\(aq, or \\e.
"""


def test_every_kind_is_in_its_parts_and_some_in_the_test_alone(monkeypatch, tmp_path: Path) -> None:
    files = {f"file{i:02}": f"Line {i}.\n\n\tTab.\n" * 100 for i in range(20)}
    monkeypatch.setattr(
        texts, "KINDS", {"novel": lambda: iter(files.items()), "licence": lambda: iter([("GPL", "Freedom.\n")])}
    )
    monkeypatch.setattr(texts, "MOST", 10_000)
    directory = texts.fetch(tmp_path / "texts")
    parts = {part.name: sorted(file.name for file in part.iterdir()) for part in directory.iterdir()}
    assert parts.keys() == {"train", "validation", "test"}
    assert "licence-GPL.txt" in parts["test"]
    assert not any("licence" in name for name in parts["train"] + parts["validation"])
    novels = [name for part in parts.values() for name in part if "novel" in name]
    assert len(novels) == len(set(novels))
    counts = {name: sum("novel" in file for file in part) for name, part in parts.items()}
    # no more of a kind than 10,000 characters
    assert counts == {"test": 4, "validation": 4, "train": 6}
    assert (directory / "train" / parts["train"][0]).read_text().endswith("\n\n\tTab.\n\n")


def test_a_manual_page_is_read_without_its_macros() -> None:
    text = texts.plain_manual(MANUAL)
    assert "NAME\n       cat - print files\n" in text
    assert "SEE ALSO\n       tac(1),\n\n" in text
    assert "       file\n       A 'name', or \\." in text
    assert "comment" not in text


def test_strings_of_r_are_those_of_its_longest_vector() -> None:
    def vector(*words: bytes) -> bytes:
        held = b"".join(struct.pack(">ii", 0x00040009, len(word)) + word for word in words)
        return struct.pack(">ii", 16, len(words)) + held

    data = b"X\n\x00\x00\x00\x02" + vector(b"title") + vector(b"Emma Woodhouse,", b"", b"handsome") + vector(b"end")
    assert texts.strings_of_r(data) == ["Emma Woodhouse,", "", "handsome"]


def test_where_there_is_no_apt_get_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fortunes is a package of Debian, and this machine has no apt-get\. Run"):
        texts.unpacked("fortunes", tmp_path)
