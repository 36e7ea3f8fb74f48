"""A real browser, without a window: Chromium, spoken to by its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)


class Tab:
    """A page of the browser. What it asks with `confirm` is answered with yes."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        sent = self._send(method, params)
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == sent:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        return self._last

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Page.javascriptDialogOpening":
                self._send("Page.handleJavaScriptDialog", {"accept": True})
            case "Runtime.exceptionThrown":
                self.errors.append(event["params"]["exceptionDetails"].get("exception", {}).get("description", "?"))
            case "Log.entryAdded" if event["params"]["entry"]["source"] == "security":
                self.errors.append(event["params"]["entry"]["text"])

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"Never true: {expression}; the page: {self.text('body')}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        # behind this call, since a question of the page would hold it up
        self.evaluate(f"setTimeout(() => document.querySelector({json.dumps(selector)}).click())")

    def fill(self, selector: str, text: str) -> None:
        """Type a text."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def unnamed_controls(self) -> list[str]:
        """Roles of the controls that a screen reader has no name for."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        controls = {"button", "textbox", "checkbox", "radio", "progressindicator", "dialog", "region"}
        shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
        assert shown
        return [node["role"]["value"] for node in shown if not node.get("name", {}).get("value")]


@contextmanager
def browser(profile: Path, url: str) -> Iterator[Tab]:
    """Open a page in a browser of its own.

    Args:
        profile: a folder for what the browser keeps.

    Raises:
        RuntimeError: there is no Chromium, which Debian has in a package.
    """
    command = shutil.which("chromium")
    if command is None:
        raise RuntimeError("There is no Chromium: apt-get install chromium.")
    process = subprocess.Popen(
        [command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = _port(profile / "DevToolsActivePort", process)
        target = httpx.put(f"http://127.0.0.1:{port}/json/new?{url}", timeout=30).raise_for_status().json()
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            tab = Tab(socket)
            # before it there is an empty page
            tab.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")
            yield tab
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file: Path, process: subprocess.Popen, timeout: float = 60) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Chromium ended with status {process.returncode} while it started."
        if file.exists() and "\n" in (text := file.read_text()):
            return int(text.splitlines()[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not start in time.")
