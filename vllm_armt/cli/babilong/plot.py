"""The heat maps of BABILong, and accuracy by the number of facts, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_armt.cli.bench.table import Row


def draw(rows: Sequence[Row], title: str, directory: Path) -> None:
    """Write `accuracy.png` (task by length) and `depth.png` (for each task depth by length); with stories of chosen
    numbers of facts `facts.png` instead."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(name: str, figure: Figure) -> None:
        figure.suptitle(title, fontsize="small")
        FigureCanvasAgg(figure)
        figure.savefig(directory / name, dpi=120, format="png")

    tasks = list(dict.fromkeys(row.case["task"] for row in rows))
    lengths = sorted({row.case["length"] for row in rows})
    if any("facts" in row.case for row in rows):
        figure = Figure(figsize=(8, 5), layout="constrained")
        _by_facts(figure.add_subplot(), rows)
        return save("facts.png", figure)
    cells = {(row.case["task"], row.case["length"]): row for row in rows}
    names = [name_of(length) for length in lengths]

    figure = Figure(figsize=(2 + 0.9 * len(lengths), 1.5 + 0.6 * len(tasks)), layout="constrained")
    shares = [[_value(cells.get((task, length)), "accuracy") for length in lengths] for task in tasks]
    _heat(figure.add_subplot(), shares, names, tasks)
    save("accuracy.png", figure)

    figure = Figure(figsize=(2 + 0.9 * len(lengths), 0.5 + 3.5 * len(tasks)), layout="constrained")
    for i, task in enumerate(tasks):
        columns = [_depths(cells.get((task, length))) for length in lengths]
        depths = max(map(len, columns))
        shares = [[column[depth] if column else None for column in columns] for depth in range(depths)]
        axes = figure.add_subplot(len(tasks), 1, i + 1)
        _heat(axes, shares, names, [f"{depth / depths:.0%}" for depth in range(depths)])
        axes.set_title(task, fontsize="small")
        axes.set_ylabel("depth of the first needed fact, from")
    save("depth.png", figure)
    return None


def name_of(length: int) -> str:
    """A number of tokens as BABILong writes it: 0k, 16k, 1M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if length % unit == 0 and (length or unit == 1_000):
            return f"{length // unit}{letter}"
    return str(length)


def _heat(axes: Any, shares: list[list[float | None]], columns: Sequence[str], rows: Sequence[str]) -> None:
    values = [[float("nan") if share is None else share for share in row] for row in shares]
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("tokens")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share is not None:
                axes.text(x, y, f"{share:.0%}".removesuffix("%"), ha="center", va="center", fontsize="small")


def _by_facts(axes: Any, rows: Sequence[Row]) -> None:
    for task, length in dict.fromkeys((row.case["task"], row.case["length"]) for row in rows):
        line = [row for row in rows if (row.case["task"], row.case["length"]) == (task, length)]
        line.sort(key=lambda row: row.case["facts"])
        x, y = [row.case["facts"] for row in line], [row.summary["accuracy"] for row in line]
        below = [_value(row, "accuracy") - _value(row, "low") for row in line]
        above = [_value(row, "high") - _value(row, "accuracy") for row in line]
        axes.errorbar(x, y, yerr=(below, above), marker="o", capsize=3, label=f"{task}, {name_of(length)}")
    axes.set_xlabel("facts")
    axes.set_ylabel("right, with 95 % intervals")
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")


def _depths(row: Row | None) -> list[float | None]:
    if row is None:
        return []
    by_depth: Any = row.summary["by_depth"]
    return [right / total if total else None for right, total in by_depth]


def _value(row: Row | None, key: str) -> Any:
    return None if row is None else row.summary[key]
