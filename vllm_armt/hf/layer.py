"""A base model's decoder layer with something of the segments before flowing into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_armt.hf.cache import RecurrentCache


@dataclass(frozen=True)
class Call:
    """The rows of one segment that the base model runs on: `[prefix | tokens | suffix]`.

    Attributes:
        cache: the texts so far.
        prefix: rows of the prefix among them; 0 unless the segment begins here.
        suffix: rows of the suffix among them; 0 unless the segment closes here.
    """

    cache: RecurrentCache
    prefix: int
    suffix: int


class RecurrentLayer(nn.Module):
    """A decoder layer, and what happens to its rows before and after.

    The model sets `call` around each forward of the base model: not every base model hands its layers
    further arguments.
    """

    call: Call

    def __init__(self, layer: nn.Module, layer_idx: int):
        super().__init__()
        self.layer = layer
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run one cell.

        Args:
            hidden_states: `[B, rows, d]`, the rows of `call`.
            args, kwargs: what the base model hands to its layers.

        Returns:
            What the base model's layer does.
        """
        output = self.layer(self.enter(hidden_states), *args, **kwargs)
        self.leave(output[0] if isinstance(output, tuple) else output)
        return output

    def enter(self, hidden_states: Tensor) -> Tensor:
        """The rows `[B, rows, d]` as the decoder layer is to see them."""
        raise NotImplementedError

    def leave(self, hidden_states: Tensor) -> None:
        """Keep what flows on of the decoder layer's output `[B, rows, d]`."""
        raise NotImplementedError
