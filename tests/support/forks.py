"""Processes for tests, made by `fork`: quick, and what a process that ends lets go of is let go of indeed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

CHANGING = ("open", "write", "pwrite", "fsync", "rename", "unlink", "utime", "ftruncate")


def fork(function: Callable[[], object]) -> int:
    """Run a function in a child process, which ends with 0, or 1 and a traceback; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    """Wait for a child; gives its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def before_step(
    step: int, act: Callable[[], object], replace: Callable[[Any, str, Any], object] = setattr
) -> Callable[[], bool]:
    """Call `act` before the `step`-th change of a file, counted from 0; half a write comes first.

    Gives a function that says whether that step was reached.

    Args:
        replace: sets an attribute of `os`; `monkeypatch.setattr` where it is to be undone.
    """
    count = 0

    def changed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & os.O_CREAT:
                return original(*args, **options)
            count += 1
            if count == step + 1:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                act()
            return original(*args, **options)

        return call

    for name in CHANGING:
        replace(os, name, changed(name, getattr(os, name)))
    return lambda: count > step
