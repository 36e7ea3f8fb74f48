"""The plugin in vLLM's own application: whom it lets in, and what it says where no memories are kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.browser import browser
from vllm_armt.memories.disk.manifest import Boundary, Model
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.http.names import Names
from vllm_armt.memories.http.plugin import MemoriesPlugin

KEY = "a secret key"


class Models:
    """vLLM's list of models."""

    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id="armt")])


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """vLLM's application, that asks for a key, with the plugin as vLLM finds it."""
    monkeypatch.setenv("VLLM_PLUGINS", "armt")
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    app = build_app(parser.parse_args(["serve", "--api-key", KEY]), ("generate",))
    assert any(isinstance(plugin, MemoriesPlugin) for plugin in app.state.endpoint_plugins)
    app.state.openai_serving_models = Models()
    return app


@pytest.fixture
def store(app: FastAPI, tmp_path: Path) -> Store:
    """The memories that the application shows, one of them."""
    store = Store(tmp_path / "memories", Model("fingerprint", "armt"))
    store.create(Boundary.start().read(range(5), 0, 16), name="book")
    app.state.memories = SimpleNamespace(
        store=store,
        names=Names(["armt"]),
        completed=lambda salt: store.list()[0],
        delete=lambda memory, salt: asyncio.to_thread(store.delete, memory, salt=salt),
    )
    return store


def call(app: FastAPI, method: str, path: str, key: str | None = KEY, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, headers=headers, **request)

    return asyncio.run(send())


ROUTES = [
    ("POST", "/v1/memories"),
    ("GET", "/v1/memories"),
    ("POST", "/v1/memories/import"),
    ("GET", "/v1/memories/book"),
    ("POST", "/v1/memories/book"),
    ("DELETE", "/v1/memories/book"),
    ("POST", "/v1/memories/book/append"),
    ("GET", "/v1/memories/book/content"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_the_key_nobody_gets_in(app, store, method, path):
    for key in (None, "wrong"):
        assert call(app, method, path, key).status_code == 401
    assert store.get("book")


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/memories")])
def test_a_server_that_keeps_no_memories_says_so(app, method, path):
    error = call(app, method, path).json()["error"]
    assert error["code"] == 501
    assert "keeps no memories" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
    ],
)
def test_a_server_that_keeps_no_memories_is_not_asked_for_them(app, path, body):
    for xargs in ({"memory": "book"}, {"save_memory": "book"}):
        response = call(app, "POST", path, json=body | {"vllm_xargs": xargs})
        assert (response.status_code, "keeps no memories" in response.text) == (501, True)


def test_memories_are_listed_behind_the_model(app, store):
    cards = call(app, "GET", "/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("armt", None), ("armt:book", "armt")]


def test_paths_do_not_leave_the_folder(app, store, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    for name in ("..%2F..%2Fsecret", "%2e%2e", "..", "a%00b", "book.json%2f..", "mem_" + "0" * 31 + "/"):
        for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert call(app, method, f"/v1/memories/{name}{end}").status_code in (400, 404, 405, 307)
    assert (tmp_path / "secret.json").exists()
    assert store.get("book")


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The application on a port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_page_asks_for_the_key_and_shows_how_far_a_text_is_read(app, store, tmp_path):
    build = store.begin(100, name="novel")
    build.progress(40, 100)
    with serving(app) as url, browser(tmp_path / "profile", f"{url}/memories") as tab:
        for key, title in (("a wrong key", "asks for its API key"), (KEY, "not accepted")):
            tab.wait_for(
                f"document.querySelector('#key-dialog').open && "
                f"document.querySelector('#key-title').innerText.includes('{title}')"
            )
            assert tab.unnamed_controls() == []
            tab.fill("#key", key)
            tab.click("#key-form button")
        tab.wait_for("document.querySelector('#list').innerText.includes('book')")
        assert "5 tokens" in tab.text("#list")
        assert "being read: 40 of 100 tokens" in tab.text("#list")
        build.progress(60, 100)
        tab.wait_for("document.querySelector('#list progress').value === 60")
        assert tab.unnamed_controls() == []
        build.fail("The disk is full.")
        tab.wait_for("document.querySelector('#list').innerText.includes('failed: The disk is full.')")
        assert tab.evaluate("document.querySelector('#key-dialog').open") is False
        assert tab.errors == []
