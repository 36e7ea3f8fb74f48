"""A guard under which nothing may read a device's values from the host, which would wait for the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__array__", "__bool__", "__int__", "__float__", "__index__")
"""Of `Tensor`; those that the dispatcher does not see on CPUs among them."""
READS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique.default,
    aten._unique2.default,
}
"""Operators whose result, or the result's shape, the host must know."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.to.device, aten._copy_from.default}


class DeviceRead(AssertionError):
    """The host asked for a value that is on the device."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise DeviceRead(f"{func} tells the host a value")
        if func in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise DeviceRead(f"{func} by a mask has a shape that depends on its values")
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            raise DeviceRead(f"{func} by counts has a shape that depends on their values")
        result = func(*args, **kwargs)
        if func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            if result.device.type == "cpu" != source.device.type:
                raise DeviceRead(f"{func} copies from {source.device} to the host")
        return result


def _refusing(name: str, method: Callable[..., Any], host: Sequence[Tensor]) -> Callable[..., Any]:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(self is tensor for tensor in host):
            return method(self, *args, **kwargs)
        raise DeviceRead(f"Tensor.{name} tells the host a value")

    return refuse


@contextmanager
def no_device_reads(host: Sequence[Tensor] = ()) -> Iterator[None]:
    """Raise `DeviceRead` wherever a value of a tensor is asked for, on whatever device the tensor is.

    Args:
        host: tensors that lie on the host by contract, and may be read with the methods of `Tensor`.
    """
    methods: dict[str, Any] = {name: _refusing(name, getattr(Tensor, name), host) for name in METHODS}
    # garbage of other tests may hold weights packed for oneDNN, whose destructor reads a tensor
    gc.disable()
    try:
        with patch.multiple(Tensor, **methods), _Operators():
            yield
    finally:
        gc.enable()
