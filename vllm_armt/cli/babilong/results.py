"""What was answered: every sample as it comes, and what follows from them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vllm_armt.cli.babilong import leaderboard
from vllm_armt.cli.bench.machine import machine
from vllm_armt.cli.bench.report import Report, describe, print_table
from vllm_armt.cli.bench.table import Chart, Column, Row

if TYPE_CHECKING:
    from vllm_armt.babilong import Cell, Sample, Source
    from vllm_armt.cli.babilong.answers import Answers

Record = dict[str, Any]

TOGETHER, TOKENS_TOGETHER = 32, 2_000_000
"""Prompts that are asked together unless said otherwise, and tokens of them, unless one alone has more."""

COLUMNS = (
    Column("task", "task"),
    Column("length", "tokens"),
    Column("facts", "facts"),
    Column("kind", "kind"),
    Column("samples", "samples"),
    Column("accuracy", "right", ".1%"),
    Column("interval", "95 % interval"),
    Column("baseline", "last place named", ".1%"),
    Column("cut_share", "of cut facts"),
)


class Results:
    """The directory of a run.

    Args:
        directory: made if it is absent.
        settings: what the samples and the answers depend on.

    Raises:
        ValueError: the directory holds samples of other settings, or a package is missing that tells of the machine.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        # before anything is asked: what is missing to write the results is said while nothing is lost
        self.machine = machine()
        self.file = directory / "samples.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self.records = {_key(record): record for record in self._read()}
        kept = directory / "settings.json"
        # a run that got no answer yet may be started again in another way
        if self.records and (before := json.loads(kept.read_text())) != settings:
            differing = [name for name in settings if before.get(name) != settings[name]]
            raise ValueError(
                f"{directory} holds a run with another {', '.join(differing)}. Choose another --output, or remove it."
            )
        kept.write_text(json.dumps(settings, indent=1) + "\n")

    def collect(
        self, samples: Source, start: Callable[[], Answers], cells: Sequence[Cell], count: int, together: int | None
    ) -> None:
        """Ask every sample that has no answer yet, and write each down as it comes; who is asked starts if need be.

        Args:
            samples: where they come from.
            start: whom to ask.
            cells: of the table.
            count: of samples of each cell.
            together: prompts at a time; None for `TOGETHER`, and fewer of long ones.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from vllm_armt.babilong import is_right, task_named

        counts = {cell: samples.count(cell, count) for cell in cells}
        every = {cell: [i for i in range(counts[cell]) if (*astuple(cell), i) not in self.records] for cell in cells}
        if not any(every.values()):
            return
        answers = start()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress, self.file.open("a") as file:
            for cell, missing in every.items():
                task = task_named(cell.task)
                bar = progress.add_task(
                    describe(_case(cell)), total=counts[cell], completed=counts[cell] - len(missing)
                )
                size = together or max(1, min(TOGETHER, TOKENS_TOGETHER // max(1, cell.length)))
                for begin in range(0, len(missing), size):
                    group = [samples.sample(task, cell, i) for i in missing[begin : begin + size]]
                    for sample, output in answers(group):
                        record = _record(sample, output, is_right(task, sample.story.question, output))
                        self.records[_key(record)] = record
                        file.write(json.dumps(record) + "\n")
                        file.flush()
                        progress.advance(bar)

    @contextmanager
    def written(self, cells: Sequence[Cell], count: int, min_accuracy: float | None, plot: bool) -> Iterator[None]:
        """Collect inside; what there is then is printed and written, also if it ends with an error.

        Raises:
            typer.Exit: a cell's accuracy is less than asked for; after everything was written.
        """
        try:
            yield
        finally:
            rows = [row for cell in cells if (row := self._row(cell, count))]
            if rows:
                self._write(rows, plot)
        problems = [
            f"{describe(row.case)}: {row.ratio:.3f} is less than --min-accuracy {min_accuracy}."
            for row in rows
            if min_accuracy is not None and row.ratio is not None and row.ratio < min_accuracy
        ]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            raise typer.Exit(1)

    def _read(self) -> list[Record]:
        if not self.file.exists():
            return []
        text = self.file.read_text()
        if not text.endswith("\n"):
            # a run that was killed while it wrote has left half a line
            text = text[: text.rfind("\n") + 1]
            self.file.write_text(text)
        return [json.loads(line) for line in text.splitlines()]

    def _row(self, cell: Cell, count: int) -> Row | None:
        from vllm_armt.babilong import wilson
        from vllm_armt.babilong.samples import DEPTHS

        keys = ((*astuple(cell), i) for i in range(count))
        records = [self.records[key] for key in keys if key in self.records]
        if not records:
            return None
        right = [record for record in records if record["right"]]
        low, high = wilson(len(right), len(records))
        cuts = [record["right"] for record in records if record["is_cut"]]
        depths = [[0, 0] for _ in range(DEPTHS)]
        for record in records:
            if record["depth"] is None:
                continue
            depth = depths[min(DEPTHS - 1, int(record["depth"] * DEPTHS))]
            depth[0] += record["right"]
            depth[1] += 1
        summary: dict[str, Any] = {
            "samples": len(records),
            "right": len(right),
            "accuracy": len(right) / len(records),
            "low": low,
            "high": high,
            "interval": f"{low:.1%} - {high:.1%}",
            "baseline": sum(record.get("last") == record["answer"] for record in records) / len(records),
            "cut": len(cuts),
            "cut_right": sum(cuts),
            "cut_share": f"{sum(cuts)}/{len(cuts)}",
            "by_depth": depths,
        }
        return Row(_case(cell), {}, summary, summary["accuracy"])

    def _write(self, rows: list[Row], plot: bool) -> None:
        title = f"{self.settings['model']}: facts hidden in text, lengths in tokens of {self.settings['lengths_in']}"
        report = Report("babilong", title, COLUMNS, CHART)
        report.rows = rows
        print_table(report)
        data = {
            "command_line": shlex.join(["vllm-armt", *sys.argv[1:]]),
            "machine": self.machine,
            "settings": self.settings,
            "cells": [row.case | row.summary for row in rows],
        }
        (self.directory / "results.json").write_text(json.dumps(data, indent=1) + "\n")
        leaderboard.write(self.directory, self.settings, list(self.records.values()), rows)
        if plot:
            from vllm_armt.cli.babilong.plot import draw

            draw(rows, report.title, self.directory)


CHART = Chart("length", {"accuracy": "right"}, "right", ("task", "facts", "kind"))


def _case(cell: Cell) -> dict[str, Any]:
    case: dict[str, Any] = {"task": cell.task, "length": cell.length}
    return case | {name: value for name in ("facts", "kind") if (value := getattr(cell, name)) is not None}


def _key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], record["facts"], record.get("kind"), record["index"]


def _record(sample: Sample, output: str, right: bool) -> Record:
    story = sample.story
    return {
        "task": sample.cell.task,
        "length": sample.cell.length,
        "facts": sample.cell.facts,
        "kind": sample.cell.kind,
        "index": sample.index,
        "tokens": len(sample.ids),
        "story": [fact.text for fact in story.facts],
        "starts": list(sample.starts),
        "question": story.question.text,
        "supports": list(story.question.supports),
        "answer": story.question.answer,
        "output": output,
        "last": sample.last,
        "right": right,
        "depth": sample.depth,
        "is_cut": sample.is_cut,
    }
