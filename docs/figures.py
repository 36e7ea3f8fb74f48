"""Draws the README's picture from the JSON files beside this one: `python docs/figures.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).parent / "benchmarks"
RUNS = ("attention-llama-160m.json", "attention-llama-160m-131k.json")
"""`vllm-armt bench attention` on two cores of a CPU."""
SIDES = {"base": ("full attention", "#c44e52"), "armt": ("ARMT", "#4c72b0")}


def rows() -> list[dict[str, Any]]:
    """The cases of all runs, by length."""
    found = [row for run in RUNS for row in json.loads((BENCHMARKS / run).read_text())["rows"]]
    return sorted(found, key=lambda row: row["case"]["tokens"])


def draw(file: Path) -> None:
    """Time to the first token, and memory that a request holds, over the length of its prompt."""
    cases = rows()
    tokens = [row["case"]["tokens"] for row in cases]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, megabytes = figure.subplots(1, 2)
    for side, (label, color) in SIDES.items():
        times = [median(row["repetitions"][f"{side}_prefill_seconds"]) for row in cases]
        held = [row["summary"][f"{side}_megabytes"] for row in cases]
        for axes, values, unit in ((seconds, times, "s"), (megabytes, held, "MB")):
            axes.plot(tokens, values, marker="o", label=label, color=color)
            axes.annotate(
                f"{values[-1]:,.0f} {unit}", (tokens[-1], values[-1]), (-6, 5), textcoords="offset points", ha="right"
            )
    for axes, title in ((seconds, "seconds to the first token"), (megabytes, "MB that a request holds")):
        axes.set_title(title, fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the prompt")
        axes.grid(alpha=0.3)
        axes.set_ylim(top=axes.get_ylim()[1] * 2)
        axes.legend(fontsize="small", loc="upper left")
    figure.savefig(file, dpi=110, format="png")


if __name__ == "__main__":
    draw(BENCHMARKS / "length.png")
