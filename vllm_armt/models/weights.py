"""Loading a checkpoint into stacked parameters, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vllm_armt.linear.stacked import StackedLinear


@dataclass(frozen=True)
class Slot:
    """The place of a decoder layer's tensor in a stacked parameter.

    Attributes:
        shape: what the checkpoint's tensor must have.
        load: called with the layer and the tensor.
    """

    shape: tuple[int, ...]
    load: Callable[[int, Tensor], object]

    @classmethod
    def of_linear(cls, prefix: str, linear: StackedLinear) -> dict[str, Slot]:
        """The slots of a stacked linear layer's parts: `{prefix}.{part}.weight` and, with biases, `.bias`."""
        dot = f"{prefix}." if prefix else ""
        return {
            f"{dot}{part}.{kind}": cls(linear.shape_of(part, kind), partial(linear.load, part, kind))
            for part in linear.parts
            for kind in linear.kinds
        }

    @classmethod
    def of_fused(cls, name: str, linear: StackedLinear, split: Callable[[Tensor], Iterable[Tensor]]) -> dict[str, Slot]:
        """The slots of a checkpoint's layer `name` that holds all parts of a stacked one in one tensor.

        Args:
            split: from its weight `[out, in]`, or its bias `[out]`, to those of the parts.
        """

        def load(kind: str, layer: int, tensor: Tensor) -> None:
            for part, piece in zip(linear.parts, split(tensor), strict=True):
                linear.load(part, kind, layer, piece)

        slots = {}
        for kind in linear.kinds:
            shapes = [linear.shape_of(part, kind) for part in linear.parts]
            slots[f"{name}.{kind}"] = cls((sum(shape[0] for shape in shapes), *shapes[0][1:]), partial(load, kind))
        return slots

    @classmethod
    def of_norm(cls, name: str, norm: nn.Module) -> dict[str, Slot]:
        """The slots of a stacked norm's parameters, each stored as `[L, size]`."""
        return {f"{name}.{kind}": cls.of_vector(parameter) for kind, parameter in norm.named_parameters()}

    @classmethod
    def of_vector(cls, parameter: nn.Parameter) -> Slot:
        """The slot of a vector per layer, stored as `[L, size]`."""
        return cls(tuple(parameter.shape[1:]), lambda layer, tensor: parameter.data[layer].copy_(tensor))

    def transposed(self) -> Slot:
        """The same place for a checkpoint that keeps weights as `[in, out]` (GPT-2's `Conv1D`)."""
        return Slot(self.shape[::-1], lambda layer, tensor: self.load(layer, tensor.t()))


def load_exactly(
    weights: Iterable[tuple[str, Tensor]],
    slots: Mapping[str, tuple[tuple[int, ...], Callable[[Tensor], object]]],
    ignored: Callable[[str], bool],
) -> None:
    """Load every tensor into its slot.

    Args:
        weights: names and tensors of a checkpoint, in any order.
        slots: by name, the expected shape and what loads the tensor.
        ignored: names that may be present without a slot.

    Raises:
        ValueError: a tensor is unexpected, has another shape than expected, or is missing; all such
            tensors of a kind are named.
    """
    missing, unexpected = set(slots), []
    for name, tensor in weights:
        if name not in slots:
            if not ignored(name):
                unexpected.append(name)
            continue
        shape, load = slots[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"The checkpoint's tensor {name!r} has shape {list(tensor.shape)}, but its config.json asks for "
                f"{list(shape)}."
            )
        load(tensor)
        missing.discard(name)
    if unexpected:
        raise ValueError(
            f"The checkpoint has tensors that a model of its config.json does not: {_some(unexpected)}. A base model "
            "is given a memory by `vllm-armt init`, a checkpoint of the research code is brought here by "
            "`vllm-armt convert`."
        )
    if missing:
        raise ValueError(f"The checkpoint lacks tensors that its config.json asks for: {_some(sorted(missing))}.")


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
