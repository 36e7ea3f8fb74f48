"""Loading a checkpoint into stacked parameters, with every tensor accounted for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.linear.weight import StackedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Of weights in a checkpoint."""


@dataclass(frozen=True)
class WeightTarget:
    """The place of a decoder layer's tensor in a stacked parameter.

    Attributes:
        shape: what the checkpoint's tensor must have.
        load: called with the layer and the tensor.
    """

    shape: tuple[int, ...]
    load: Callable[[int, Tensor], object]

    @classmethod
    def of_linear(cls, prefix: str, linear: StackedLinear) -> dict[str, WeightTarget]:
        """The targets of a stacked linear layer's parts: `{prefix}.{part}.weight` and, with biases, `.bias`."""
        return cls.of_parts(prefix, linear.weights)

    @classmethod
    def of_parts(cls, prefix: str, weights: Mapping[str, StackedWeight]) -> dict[str, WeightTarget]:
        """The targets of stacked tensors' parts, by what a checkpoint calls the tensors: `{prefix}.{part}.{kind}`."""
        dot = f"{prefix}." if prefix else ""
        return {
            f"{dot}{part}.{kind}": cls(weight.shape_of(part), partial(weight.load, part))
            for kind, weight in weights.items()
            for part in weight.parts
        }

    @classmethod
    def of_fused(
        cls, name: str, linear: StackedLinear, split: Callable[[Tensor], Iterable[Tensor]]
    ) -> dict[str, WeightTarget]:
        """The targets of a checkpoint's layer `name` that holds all parts of a stacked one in one tensor.

        Args:
            split: from its weight `[out, in]`, or its bias `[out]`, to those of the parts.
        """

        def load(weight: StackedWeight, layer: int, tensor: Tensor) -> None:
            for part, piece in zip(weight.parts, split(tensor), strict=True):
                weight.load(part, layer, piece)

        targets = {}
        for kind, weight in linear.weights.items():
            shapes = [weight.shape_of(part) for part in weight.parts]
            targets[f"{name}.{kind}"] = cls((sum(shape[0] for shape in shapes), *shapes[0][1:]), partial(load, weight))
        return targets

    @classmethod
    def of_norm(cls, name: str, norm: nn.Module) -> dict[str, WeightTarget]:
        """The targets of a stacked norm's parameters, each stored as `[L, size]`."""
        return {f"{name}.{kind}": cls.of_vector(parameter) for kind, parameter in norm.named_parameters()}

    @classmethod
    def of_vector(cls, parameter: nn.Parameter) -> WeightTarget:
        """The target of a vector per layer, stored as `[L, size]`."""
        return cls(tuple(parameter.shape[1:]), lambda layer, tensor: parameter.data[layer].copy_(tensor))

    def transposed(self) -> WeightTarget:
        """The same place for a checkpoint that keeps weights as `[in, out]` (GPT-2's `Conv1D`)."""
        return WeightTarget(self.shape[::-1], lambda layer, tensor: self.load(layer, tensor.t()))


def load_exactly(
    weights: Iterable[tuple[str, Tensor]],
    targets: Mapping[str, tuple[tuple[int, ...], Callable[[Tensor], object]]],
    ignored: Callable[[str], bool],
    may_lack: bool = False,
) -> None:
    """Load every tensor into its target.

    Args:
        weights: names and tensors of a checkpoint, in any order.
        targets: by name, the expected shape and what loads the tensor.
        ignored: names that may be present without a target.
        may_lack: whether targets may go without a tensor, and keep what they have.

    Raises:
        ValueError: a tensor is unexpected, has another shape than expected, is no weights, or is missing; all such
            tensors of a kind are named.
    """
    missing, unexpected = set(targets), []
    finite: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        if name not in targets:
            if not ignored(name):
                unexpected.append(name)
            continue
        shape, load = targets[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"The checkpoint's tensor {name!r} has shape {list(tensor.shape)}, but its config.json asks for "
                f"{list(shape)}."
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"The checkpoint's tensor {name!r} is of {tensor.dtype}; weights are {', '.join(map(str, DTYPES))}."
            )
        load(tensor)
        missing.discard(name)
        if tensor.numel():
            # NaN wins in both ends; where they lie on a device, nobody waits for them yet
            finite[tensor.device][name] = torch.stack(torch.aminmax(tensor)).isfinite().all()
    if unexpected:
        raise ValueError(
            f"The checkpoint has tensors that a model of its config.json does not: {_some(unexpected)}. A base model "
            "is given a memory by `vllm-armt init`, a checkpoint of the research code is brought here by "
            "`vllm-armt convert`."
        )
    if missing and not may_lack:
        raise ValueError(f"The checkpoint lacks tensors that its config.json asks for: {_some(sorted(missing))}.")
    flags = {name: flag for flags in finite.values() for name, flag in zip(flags, _to_host(flags), strict=True)}
    if unsound := sorted(name for name, is_finite in flags.items() if not is_finite):
        raise ValueError(
            f"The checkpoint's weights hold NaN or infinity: {_some(unsound)}. The training went astray, or the file "
            "is damaged: take an earlier checkpoint."
        )


def _to_host(flags: Mapping[str, Tensor]) -> list[bool]:
    return torch.stack(list(flags.values())).tolist()


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
