"""The diagonal order of an ARMT's cells, for training: cells (segment s, layer l) of equal s + l are one grouped call.

A cell takes its rows from the layer below in its segment, and M and z from its layer in the segment before.
Both lie on the diagonal before its own, so N segments pass L layers in N + L - 1 calls in place of N L, with the
same result and the same gradients.

The model calls its base model once, with all segments as its batch, so that embeddings, positions, masks and the
final norm are the base model's own. The first layer's forward then sweeps all cells, and each layer's hands out what
the sweep has made of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from vllm_armt.hf.cache import RecurrentCache


class MemoryLayer(Protocol):
    """A decoder layer with an associative memory, as far as the diagonal order knows it; a `torch.nn.Module`.

    Attributes:
        layer: the base model's decoder layer.
        sweep: where `forward` is to take its output from; None to run the layer.
    """

    layer: nn.Module
    sweep: Sweep | None

    def read(self, hidden_states: Tensor, M: Tensor, z: Tensor) -> Tensor:
        """Rows `[B, rows, d]` and what each finds in a memory (shapes as in `RecurrentCache`)."""

    def write(self, memory_tokens: Tensor, M: Tensor, z: Tensor, first: Tensor | bool) -> tuple[Tensor, Tensor]:
        """M and z after a segment, the text's `first` or not, whose memory tokens left the layer as `[B, m, d]`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of a module."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As of a module."""


@contextmanager
def sweeping(layers: Sequence[MemoryLayer], state: RecurrentCache, m: int) -> Iterator[None]:
    """Inside, one call of the base model runs all cells of its rows; see `Sweep`."""
    sweep = Sweep(layers, state, m)
    for layer in layers:
        layer.sweep = sweep
    try:
        yield
    finally:
        for layer in layers:
            layer.sweep = None


def refuse_unlike(layers: Sequence[MemoryLayer]) -> None:
    """Refuse layers that differ in more than the values of their weights.

    Raises:
        ValueError: they do; the message says in what.
    """
    first = _traits(layers[0])
    for i, layer in enumerate(layers):
        traits = _traits(layer)
        for name in sorted(first.keys() | traits.keys()):
            if first.get(name) != traits.get(name):
                here, there = first.get(name, "absent"), traits.get(name, "absent")
                raise cannot_group(f"{name} is {here} in layer 0 and {there} in layer {i}: all must be alike")


def cannot_group(reason: str) -> ValueError:
    """The error that says why a model cannot run in this order."""
    return ValueError(
        f"schedule is 'diagonal', which groups cells of all layers, but {reason}. Change that, or use "
        "schedule='sequential'."
    )


class Sweep:
    """What all layers make of all segments of some texts.

    Args:
        layers: L, of which only the weights differ.
        state: of the texts before their first token.
        m: memory tokens of a segment.
    """

    def __init__(self, layers: Sequence[MemoryLayer], state: RecurrentCache, m: int) -> None:
        self._layers = layers
        self._state = state
        self._m = m
        self._outputs: list[list[Tensor]] = []
        self._are_tuples = False

    def output(self, i: int, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What layer i makes of the rows of all segments.

        Args:
            i: the layer, 0 first: it runs them all.
            rows: `[N * B, S + m, d]`, a segment's texts side by side.
            args, kwargs: what the base model hands to its layers: the same to each.

        Returns:
            `[N * B, S + m, d]`, in a tuple if the base model's layers return one.
        """
        if i == 0:
            B = self._state.batch_size
            args, kwargs = _for_one_segment((args, kwargs), len(rows), B)
            self._run(rows.split(B), _Cell(self._layers[0], self._m, args, kwargs))
        output = torch.cat(self._outputs[i])
        return (output,) if self._are_tuples else output

    def _run(self, segments: Sequence[Tensor], cell: _Cell) -> None:
        """Run all cells of the segments' rows `[B, S + m, d]`, diagonal by diagonal."""
        N, L = len(segments), len(self._layers)
        group = vmap(partial(functional_call, cell), randomness="different")
        weights = _stacked(self._layers)
        M, z = (list(by_layer.values()) for by_layer in (self._state.M, self._state.z))
        inputs: list[list[Tensor]] = [list(segments), *([] for _ in range(L))]
        for t in range(N + L - 1):
            layers = range(max(0, t - N + 1), min(t + 1, L))
            part = slice(layers.start, layers.stop)
            # not a slice of all: its gradient would be copied
            theirs = weights if len(layers) == L else {name: weight[part] for name, weight in weights.items()}
            rows = torch.stack([inputs[layer][t - layer] for layer in layers])
            first = torch.arange(layers.start, layers.stop, device=rows.device) == t
            with _grouped_attention():
                outputs, M[part], z[part] = group(theirs, (rows, torch.stack(M[part]), torch.stack(z[part]), first))
            for layer, output in zip(layers, outputs, strict=True):
                inputs[layer + 1].append(output)
        self._outputs, self._are_tuples = inputs[1:], cell.returns_tuple


class _Cell(nn.Module):
    """One segment at one layer, with nothing kept from call to call.

    Args:
        layer: any of them; the weights come with the call.
        m: memory tokens of a segment.
        args, kwargs: further arguments of the base model's layer.
    """

    def __init__(self, layer: MemoryLayer, m: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.m = m
        self.args, self.kwargs = args, kwargs
        self.returns_tuple = False

    def forward(self, rows: Tensor, M: Tensor, z: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows `[B, S + m, d]`, M and z behind the cell; an empty memory adds nothing to a `first` segment's."""
        output = self.layer.layer(self.layer.read(rows, M, z), *self.args, **self.kwargs)
        self.returns_tuple = isinstance(output, tuple)
        rows = output[0] if self.returns_tuple else output
        return rows, *self.layer.write(rows[:, -self.m :], M, z, first)


def _stacked(layers: Sequence[MemoryLayer]) -> dict[str, Tensor]:
    """The layers' parameters under their names in a cell, `[L, *]`; gradients reach each layer's own."""
    parameters = [dict(layer.named_parameters()) for layer in layers]
    return {f"layer.{name}": torch.stack([of_layer[name] for of_layer in parameters]) for name in parameters[0]}


def _for_one_segment(value: Any, rows: int, B: int) -> Any:
    """What the base model hands to a layer for `rows` rows of a batch, for the B of one segment."""
    if isinstance(value, tuple):
        return tuple(_for_one_segment(x, rows, B) for x in value)
    if isinstance(value, dict):
        return {name: _for_one_segment(x, rows, B) for name, x in value.items()}
    return value[:B] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows else value


@contextmanager
def _grouped_attention() -> Iterator[None]:
    # without memory-efficient attention: its backward pass refuses what vmap makes of its forward pass's results
    with warnings.catch_warnings(), _CastAttention(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        # the CPU's fused attention has no batching rule and runs cell by cell, which loses nothing there
        warnings.filterwarnings("ignore", message=".*batching rule for aten::_scaled_dot_product.*_for_cpu")
        yield


class _CastAttention(TorchFunctionMode):
    """Casts queries, keys and values as autocast would, which vmap has taken apart before it sees them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and torch.is_autocast_enabled(args[0].device.type):
            dtype = torch.get_autocast_dtype(args[0].device.type)
            args = [x.to(dtype) for x in args]
        return func(*args, **kwargs or {})


def _traits(layer: MemoryLayer) -> dict[str, Any]:
    """What grouped layers must have in common: shapes and dtypes of weights, and the numbers they compute with."""
    traits: dict[str, Any] = {name: (tuple(x.shape), x.dtype) for name, x in layer.named_parameters()}
    for name, module in layer.named_modules():
        traits |= {f"{name}.{key}": value for key, value in vars(module).items() if _is_trait(key, value)}
    return traits


def _is_trait(key: str, value: Any) -> bool:
    # where the base model's own sliding window is shorter than a cell, layers of several are refused before
    if key.startswith("_") or key in ("layer_idx", "layer_id", "sliding_window"):
        return False
    # `scaling` holds a number for each LoRA adapter
    return isinstance(value, int | float) or key == "scaling"
