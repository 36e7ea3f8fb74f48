"""The medians of a table's rows as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_armt.cli.bench.table import Chart, Row


def draw(title: str, chart: Chart, rows: Sequence[Row], file: Path) -> None:
    """Draw what `chart` says: lines with the range of the repetitions, or stacked bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_bars if chart.stacked else _lines)(axes, chart, rows)
    axes.set_xlabel(chart.x.replace("_", " "))
    axes.set_ylabel(chart.y_label)
    axes.set_title(title, fontsize="small", wrap=True)
    if chart.stacked:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    else:
        axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120, format="png")


def _lines(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    ticks = sorted({row.value(chart.x) for row in rows})
    differing = [key for key in chart.group_by if len({row.value(key) for row in rows}) > 1]
    for group in dict.fromkeys(_group(chart, row) for row in rows):
        for key, name in chart.series.items():
            members = [row for row in rows if _group(chart, row) == group and row.value(key) is not None]
            if not members:
                continue
            members.sort(key=lambda row: row.value(chart.x))
            x, y = [row.value(chart.x) for row in members], [row.value(key) for row in members]
            all_values = [row.repetitions.get(key) or [row.value(key)] for row in members]
            below = [median - min(values) for median, values in zip(y, all_values, strict=True)]
            above = [max(values) - median for median, values in zip(y, all_values, strict=True)]
            label = ", ".join([name, *(f"{k.replace('_', ' ')} {v}" for k, v in group if k in differing)])
            axes.errorbar(x, y, yerr=(below, above), marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def _bars(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    names = ["\n".join(f"{row.value(key)}" for key in (chart.x, *chart.group_by)) for row in rows]
    bottom = [0.0] * len(rows)
    for key, name in chart.series.items():
        heights = [row.value(key) or 0.0 for row in rows]
        axes.bar(names, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _group(chart: Chart, row: Row) -> tuple[tuple[str, Any], ...]:
    return tuple((key, row.value(key)) for key in chart.group_by)
