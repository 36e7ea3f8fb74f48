"""Activations of MLPs, by the names that configurations of base models give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

# not vLLM's get_act_fn: its gelu_new and gelu_fast are six operators of torch's on CPUs, which take three times as long
_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    # one function, which transformers writes in several ways
    "gelu_fast": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": F.relu,
    "silu": F.silu,
}
_GATED = {
    "gelu": GeluAndMul,
    "gelu_pytorch_tanh": partial(GeluAndMul, approximate="tanh"),
    "silu": SiluAndMul,
}


def activation(config: PretrainedConfig, field: str) -> Callable[[Tensor], Tensor]:
    """The activation `[R, n] -> [R, n]` that a field of the base model's configuration names.

    Raises:
        ValueError: it is not supported.
    """
    return ACTIVATIONS[_supported(config, field, ACTIVATIONS)]


class GatedActivation(nn.Module):
    """`act(gate) * up` of `[gate | up]`, `[R, 2n] -> [R, n]`.

    Args:
        config: the base model's configuration, whose `field` names `act`.

    Raises:
        ValueError: it is not supported.
    """

    def __init__(self, config: PretrainedConfig, field: str) -> None:
        super().__init__()
        name = _supported(config, field, _GATED)
        self.act = ACTIVATIONS[name]
        self.kernel = _GATED[name]()

    def forward(self, gate_up: Tensor) -> Tensor:
        # on CPUs vLLM compiles SiluAndMul: a call for few rows, as of a decode, takes twice as long as torch's two
        if gate_up.device.type != "cpu":
            return self.kernel(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate).mul_(up)


def _supported(config: PretrainedConfig, field: str, names: dict) -> str:
    name = getattr(config, field)
    if name not in names:
        raise ValueError(
            f"`{field}` of the base model is {name!r}; supported: {', '.join(repr(known) for known in names)}."
        )
    return name
