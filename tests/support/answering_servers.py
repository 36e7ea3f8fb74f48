"""A server with OpenAI's completions API behind which somebody reads the prompt and knows bAbI's English."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.solver import solve

FACT = re.compile(r"(?:Mary|John|Sandra|Daniel) (?:moved|went|went back|journeyed|travelled) to the \w+\.")


def read(text: str) -> str:
    """The answer to a prompt of qa1."""
    question = re.findall(r"Where is \w+\?", text)[-1]
    return f" {solve(FACT.findall(text), question)}."


class Fake:
    """Counts what it is asked.

    Attributes:
        prompts: of each request, as tokens or as text.
        fail_after: answer so many requests, and none any more.
        answer: from the prompt's text to what is written.
    """

    def __init__(self, tokenizer: Any, root: Path) -> None:
        self.tokenizer = tokenizer
        self.root = root
        self.prompts: list[list[int] | str] = []
        self.fail_after: int | None = None
        self.answer: Callable[[str], str] = read
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if self.fail_after is not None and len(self.prompts) >= self.fail_after:
                return 400, {"error": {"message": "no more"}}
            prompt = body["prompt"]
            self.prompts.append(prompt)
        assert body["temperature"] == 0
        text = self.answer(prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt))
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        return 200, {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def prompt_of(record: dict[str, Any], fake: Fake) -> list[int]:
    """The one prompt that has the facts of a record where the record says."""

    def tells(prompt: Any) -> bool:
        places = zip(record["story"], record["starts"], strict=True)
        # a fact has no more tokens than that
        return all(fake.tokenizer.decode(prompt[at : at + 64]).lstrip().startswith(fact) for fact, at in places)

    (found,) = [prompt for prompt in fake.prompts if len(prompt) == record["tokens"] and tells(prompt)]
    assert not isinstance(found, str)
    return found


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """The address of the server while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card = {"id": "fake", "object": "model", "created": 0, "owned_by": "x", "root": str(fake.root)}
            self._send(200, {"object": "list", "data": [card]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*fake.complete(body))

        def _send(self, status: int, data: dict[str, Any]) -> None:
            text = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
