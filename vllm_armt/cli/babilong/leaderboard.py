"""BABILong's own CSV files: its scripts then read our answers, and its leaderboard our figures.

`leaderboard/TASK_LENGTH_SETTINGS.csv` has a line a sample (target, output, question), as BABILong's `collect_results`
takes them; `leaderboard.csv` has a line a task with the percentage right by length.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_armt.cli.babilong.plot import name_of

if TYPE_CHECKING:
    from vllm_armt.cli.bench.table import Row


def write(directory: Path, settings: dict[str, Any], records: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    """Write both, of samples as tasks tell them: not of a chosen number of facts, nor of a hard kind."""
    plain = [record for record in records if record["facts"] is None and record.get("kind") is None]
    if not plain:
        return
    explained, chat = ("no" if on else "yes" for on in (settings["prompt"] == "plain", settings["prompt"] != "chat"))
    told = f"instruction_{explained}_examples_{explained}_post_prompt_{explained}_chat_template_{chat}"
    folder = directory / "leaderboard"
    folder.mkdir(exist_ok=True)
    for task, length in dict.fromkeys((record["task"], record["length"]) for record in plain):
        with (folder / f"{task}_{name_of(length)}_{told}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "target", "output", "question"])
            cell = [record for record in plain if (record["task"], record["length"]) == (task, length)]
            for record in sorted(cell, key=lambda record: record["index"]):
                writer.writerow([record["index"], record["answer"], record["output"], record["question"]])
    shares = {
        (row.case["task"], row.case["length"]): row.summary["accuracy"]
        for row in rows
        if not {"facts", "kind"} & row.case.keys()
    }
    lengths = sorted({length for _, length in shares})
    with (directory / "leaderboard.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *map(name_of, lengths)])
        for task in dict.fromkeys(task for task, _ in shares):
            of_task = [shares.get((task, length)) for length in lengths]
            writer.writerow([task, *("" if share is None else round(100 * share, 1) for share in of_task)])
