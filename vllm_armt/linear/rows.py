"""Which rows belong to which layers: the shape of a grouped forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of consecutive layers, one layer's behind another's: `[R, *]` with R = sum(counts).

    Attributes:
        first_layer: the layer of the first rows.
        counts: rows of each layer.
        ends: int32 `[layers]` on the device, where each layer's rows end; only where counts differ and a
            device multiplies such rows in one product.
    """

    first_layer: int
    counts: tuple[int, ...]
    ends: Tensor | None = None

    @property
    def last_layer(self) -> int:
        return self.first_layer + len(self.counts) - 1

    def without_last(self) -> Rows:
        """The rows of all layers but the last one, which come first in `[R, *]`."""
        return Rows(self.first_layer, self.counts[:-1], None if self.ends is None else self.ends[:-1])

    @property
    def layers(self) -> slice:
        return slice(self.first_layer, self.first_layer + len(self.counts))

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have equally many rows, so that `[R, *]` is `[layers, rows, *]`."""
        return self.counts.count(self.counts[0]) == len(self.counts)

    def by_layer(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of each layer's rows of `x` `[R, *]`."""
        return (x,) if len(self.counts) == 1 else x.split(self.counts)

    def stacked(self, x: Tensor) -> Tensor:
        """`x` `[R, *]` of uniform rows as `[layers, rows, *]`."""
        return x.unflatten(0, (len(self.counts), self.counts[0]))
