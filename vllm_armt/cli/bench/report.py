"""Results of a benchmark: every repetition, the medians as a table, and the files that they go to."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from vllm_armt.cli.bench.machine import machine

if TYPE_CHECKING:
    from vllm_armt.cli.bench.options import Output


@dataclass(frozen=True)
class Column:
    """A column of the table: the repetitions' median, or a value of a row's summary or case.

    Attributes:
        key: which.
        header: what the table calls it.
        format: of numbers, as for `format()`.
        spread: whether the range of the repetitions is shown.
    """

    key: str
    header: str
    format: str = ",.0f"
    spread: bool = True


@dataclass(frozen=True)
class Chart:
    """What a plot shows.

    Attributes:
        x: the case's key on the horizontal axis.
        series: keys of repetitions, or of the summary, with their names; one line each, or the parts of a bar.
        y_label: of the vertical axis.
        apart: keys of cases that get lines of their own.
        stacked: parts of a whole, as bars.
    """

    x: str
    series: dict[str, str]
    y_label: str
    apart: tuple[str, ...] = ()
    stacked: bool = False


@dataclass
class Row:
    """One case.

    Attributes:
        case: what was measured.
        repetitions: every measurement by its name, in the order of the rounds.
        summary: what follows from them; None where a side was not measured.
        ratio: what must reach `--min-ratio`; None if that does not apply here.
    """

    case: dict[str, Any]
    repetitions: dict[str, list[float]]
    summary: dict[str, float | int | None] = field(default_factory=dict)
    ratio: float | None = None

    def value(self, key: str) -> Any:
        """A case's or summary's value, or the median of repetitions; None if there is none."""
        if values := self.repetitions.get(key):
            return statistics.median(values)
        return self.case.get(key, self.summary.get(key))

    def text(self, column: Column) -> str:
        """The cell of the table; ± is half the range of the repetitions, in per cent of the median."""
        value = self.value(column.key)
        if value is None:
            return "-"
        if not isinstance(value, int | float):
            return str(value)
        text = format(value, column.format)
        values = self.repetitions.get(column.key, [])
        if column.spread and len(values) > 1 and value:
            text += f" ±{(max(values) - min(values)) / 2 / abs(value):.0%}"
        return text


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

            draw(self, output.plot_file)

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
