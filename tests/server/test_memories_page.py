"""The page `/memories`, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Tab, browser
from tests.support.http_memories import Memories
from tests.support.small_model import S
from tests.support.tiny_checkpoint import MODEL, random_text

pytestmark = pytest.mark.server


@pytest.fixture
def tab(server: str, memories: Memories, tmp_path: Path) -> Iterator[Tab]:
    with browser(tmp_path / "profile", f"{server}/memories") as tab:
        yield tab
        assert tab.errors == []


def test_a_text_is_dropped_in_read_asked_and_forgotten(tab, memories, tmp_path):
    tab.wait_for("document.querySelector('#list-note').innerText.startsWith('Nothing yet')")
    tab.wait_for(f"document.querySelector('#model').innerText.includes('{MODEL}')")
    assert tab.unnamed_controls() == []
    book = tmp_path / "War & Peace.txt"
    book.write_text(random_text(20 * S, seed=71))
    tab.choose_file("#file", book)
    assert tab.evaluate("document.querySelector('#name').value") == "War-Peace"
    tab.click("#read-button")
    tab.wait_for("document.querySelector('#read-note').innerText.includes('is read: 320 tokens')")
    memory = memories.get("War-Peace")
    tab.wait_for(f"document.querySelector('#list input[value={memory['id']}]')?.checked")
    assert "320 tokens" in tab.text("#list")
    assert tab.unnamed_controls() == []
    tab.fill("#question", "Where is Mary?")
    tab.click("#raw")
    tab.click("#ask-button")
    tab.wait_for("document.querySelector('#ask-note').innerText.startsWith('320 tokens were not read again')")
    assert len(tab.evaluate("document.querySelector('#answer').textContent")) > 0
    tab.click("#list button")
    tab.wait_for("document.querySelectorAll('#list li').length === 0")
    memories.get("War-Peace", 404)


def test_an_answer_streams_and_can_be_stopped(tab, memories):
    memories.read("A short text.", "short")
    tab.wait_for("document.querySelector('#list input')")
    tab.click("#list input")
    tab.wait_for("!document.querySelector('#ask-button').disabled")
    tab.fill("#question", "And then?")
    tab.click("#ask-button")
    # more and more of it
    lengths = "(window.lengths ??= new Set()).add(document.querySelector('#answer').textContent.length).size"
    tab.wait_for(f"{lengths} > 2")
    if tab.evaluate("!document.querySelector('#stop').hidden"):
        tab.click("#stop")
    tab.wait_for("!document.querySelector('#ask-button').disabled")
    assert tab.text("#ask-note").startswith(("Stopped", "13 tokens"))


def test_what_goes_wrong_is_said(tab, memories, tmp_path):
    memories.read("text", "taken")
    file = tmp_path / "taken.txt"
    file.write_text("another text")
    tab.choose_file("#file", file)
    tab.click("#read-button")
    tab.wait_for("document.querySelector('#read-note').innerText.includes('is taken by')")
    file.write_bytes(b"\xff\xfe")
    tab.choose_file("#file", file)
    tab.click("#read-button")
    tab.wait_for("document.querySelector('#read-note').innerText.includes('UTF-8')")


def test_the_page_is_one_file_that_loads_nothing_else(http):
    response = http.get("/memories")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not [word for word in ("src=", "@import", "http://", "https://") if word in response.text]
