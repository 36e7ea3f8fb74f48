"""What a table of results and its plot consist of: columns, rows, and what the plot shows of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


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
        group_by: keys of cases; one line for each combination of their values.
        stacked: parts of a whole, as bars.
    """

    x: str
    series: dict[str, str]
    y_label: str
    group_by: tuple[str, ...] = ()
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
