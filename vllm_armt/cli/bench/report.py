"""Results of a benchmark: every repetition, the medians as a table, and the files that they go to."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from vllm_armt.cli.bench.machine import machine
from vllm_armt.cli.bench.table import Chart, Column, Row

if TYPE_CHECKING:
    from vllm_armt.cli.bench.options import Output


class Report:
    """Collects rows and says at the end whether all is well."""

    def __init__(self, command: str, title: str, columns: Sequence[Column], chart: Chart) -> None:
        self.command = command
        self.title = title
        self.columns = columns
        self.chart = chart
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.engines: list[dict[str, Any]] = []
        self._machine: dict[str, Any] = {}

    @contextmanager
    def written(self, output: Output) -> Iterator[Report]:
        """Measure inside; what has been measured is printed and written, also if it ends with an error.

        Raises:
            typer.Exit: sides disagreed, or a ratio is less than asked for; after everything was written.
        """
        self._machine = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | machine()
        try:
            yield self
        finally:
            self._judge(output.min_ratio)
            self._write(output)
        for problem in self.problems:
            print(f"error: {problem}", file=sys.stderr)
        if self.problems:
            raise typer.Exit(1)

    def progress(self, text: str) -> None:
        """Say what is done next; on stderr, so that stdout holds the tables alone."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def _judge(self, min_ratio: float | None) -> None:
        for row in self.rows:
            # not "<": a ratio that is not a number has not reached anything
            if min_ratio is not None and row.ratio is not None and not row.ratio >= min_ratio:
                self.problems.append(f"{describe(row.case)}: {row.ratio:.3f} is less than --min-ratio {min_ratio}.")

    def _write(self, output: Output) -> None:
        print_table(self)
        if output.json_file:
            output.json_file.write_text(json.dumps(self._json(), indent=1) + "\n")
        if output.plot_file and self.rows:
            from vllm_armt.cli.bench.plot import draw

            draw(self.title, self.chart, self.rows, output.plot_file)

    def _json(self) -> dict[str, Any]:
        return {
            "benchmark": self.command,
            "command_line": shlex.join(["vllm-armt", *sys.argv[1:]]),
            "machine": self._machine,
            "engines": self.engines,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "problems": self.problems,
        }


def print_table(report: Report) -> None:
    """Print title, table and notes as Markdown, which reads well enough on a screen and fits a document."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(box=MARKDOWN, title=None)
    for column in report.columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*(row.text(column) for column in report.columns))
    # as wide as it gets: a cell that is cut off would be a wrong number
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(table)
    print(report.title, capture.get().strip(), *report.notes, sep="\n\n")


def describe(case: dict[str, Any]) -> str:
    """A case in one line."""
    return ", ".join(f"{key} {value}" for key, value in case.items())


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of `above / below`; what both sides of a round had in common cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def rounds(repeat: int, max_seconds: float) -> Iterator[int]:
    """Count up to `repeat` rounds, and start no further one after `max_seconds`."""
    begin = time.perf_counter()
    for i in range(repeat):
        if i and time.perf_counter() - begin > max_seconds:
            return
        yield i
