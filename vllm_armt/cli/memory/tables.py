"""Memories as a table and as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_armt.memories.disk.manifest import Manifest


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_memories(memories: Sequence[Manifest]) -> None:
    """One line a memory."""
    from rich.table import Table

    table = Table("name", "id", "status", "dtype", "made", "used")
    for header in ("tokens", "segments", "bytes"):
        table.add_column(header, justify="right")
    for memory in memories:
        table.add_row(
            memory.name or "-",
            memory.id,
            status(memory),
            memory.identity.get("dtype", "?"),
            moment(memory.created_at),
            moment(memory.last_used_at),
            f"{memory.tokens:,}",
            f"{memory.segments:,}",
            size(memory.bytes),
        )
    print_table(table)


def print_table(table: Table) -> None:
    """As wide as it gets where it isn't a screen: a cell that is cut off would be a wrong answer."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def status(memory: Manifest) -> str:
    """Of a memory in progress with how far it is."""
    if memory.status == "in_progress" and memory.progress and memory.progress[1]:
        return f"in_progress {memory.progress[0] / memory.progress[1]:.0%}"
    return memory.status


def moment(seconds: float | None) -> str:
    """A time, on this machine's clock."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def size(number: int) -> str:
    """Of bytes."""
    return f"{number / 1e6:,.2f} MB"
