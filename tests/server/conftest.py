"""One `vllm serve` process for all tests here, its clients, and the model that its answers are compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

import vllm_armt.hf  # noqa: F401  (registers the model)
from examples.server import serve
from tests.support.golden_cases import Golden
from tests.support.http_memories import Memories
from tests.support.small_model import S
from tests.support.tiny_checkpoint import FLAGS, add_tokenizer, pages_held, random_text, requests_open

LOG = pytest.StashKey[Path]()
UPLOAD_BYTES = 1 << 18
"""That a client may send for one memory."""
TEXT = random_text(20 * S + 5, seed=31)
QUESTION = random_text(S + 3, seed=32)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ARMT with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("served") / "model"
    Golden("armt_hf_llama").copy_checkpoint(directory)
    add_tokenizer(directory)
    return directory


@contextmanager
def serving(checkpoint: Path, memories: str, *flags: str, log: Path) -> Iterator[str]:
    """The address of a server in processes of its own, as a user starts it."""
    options = {"memories": memories, "memories_max_upload_bytes": UPLOAD_BYTES}
    flags = (*FLAGS, "--additional-config", json.dumps({"armt": options}), *flags)
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:
            # set for the engines of other tests
            environment.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
            environment.setenv("VLLM_PLUGINS", "armt")
            environment.setenv("VLLM_LOGGING_LEVEL", "INFO")
            url = running.enter_context(serve(checkpoint, flags, log=log, timeout=400))
        yield url


@pytest.fixture(scope="session")
def server(checkpoint: Path, pytestconfig: pytest.Config) -> Iterator[str]:
    """The address of the server."""
    log = pytestconfig.stash[LOG] = checkpoint.parent / "server.log"
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serving(checkpoint, str(checkpoint.parent / "memories"), *flags, log=log) as url:
        yield url


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log beside a failure."""
    report = yield
    log = item.config.stash.get(LOG, None)
    if report.failed and log is not None:
        report.sections.append((f"end of {log}", "".join(log.open(errors="replace").readlines()[-40:])))
    return report


@pytest.fixture
def log_path(server: str, pytestconfig: pytest.Config) -> Path:
    """What the server logs."""
    return pytestconfig.stash[LOG]


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[OpenAI]:
    # a retry would hide that a request failed
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def memories(http: httpx.Client) -> Iterator[Memories]:
    """The server's, none at the beginning."""
    memories = Memories(http)
    yield memories
    memories.delete_all()


@pytest.fixture(scope="module")
def book(memories: Memories) -> str:
    """The name of a memory of `TEXT`."""
    memories.read(TEXT, "book")
    return "book"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(http: httpx.Client) -> Iterator[None]:
    """Whatever a test does: afterwards the server is healthy, has no request and holds no page."""
    yield
    deadline = time.monotonic() + 10
    while requests_open(http) or pages_held(http):
        assert time.monotonic() < deadline, f"{requests_open(http)} requests and {pages_held(http)} pages are left"
        time.sleep(0.05)
    assert http.get("/health").status_code == 200
