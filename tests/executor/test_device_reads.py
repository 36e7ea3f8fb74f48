"""The guard that other tests rely on catches what makes the host wait, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.device_reads import DeviceRead, no_device_reads

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "an array": lambda x: np.asarray(x),
    "a condition": lambda x: 1 if x[0] > 0 else 0,
    "all": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "an index of a list": lambda x: [0, 1][x[1]],
    "a slice": lambda x: x[: x[1]],
    "a range": lambda x: range(x[1]),
    "the largest by Python": lambda x: max(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "argwhere": lambda x: torch.argwhere(x > 1),
    "a mask": lambda x: x[x > 1],
    "writing through a mask": lambda x: x.__setitem__(x > 1, 0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "bincount": lambda x: x.bincount(),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_caught(read: Callable[[Tensor], object], device: str):
    x = torch.tensor([0, 1, 2, 3]).to(device)
    with no_device_reads(), pytest.raises((DeviceRead, NotImplementedError, RuntimeError)) as caught:
        read(x)
    assert device == "meta" or caught.type is DeviceRead


@pytest.mark.parametrize("copy", [lambda x: x.to("cpu"), lambda x: torch.empty(4).copy_(x)], ids=["to", "copy_"])
def test_a_copy_to_the_host_is_caught(copy: Callable[[Tensor], Tensor]):
    """Torch itself has nothing to copy from a device without values."""
    x = torch.empty(4, device="meta")
    with no_device_reads(), pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        copy(x)


def test_what_stays_on_the_device_is_let_through():
    x, y = torch.arange(4), torch.arange(4.0)
    with no_device_reads():
        z = torch.where(y > 1, y, 0.0).masked_fill_(x > 2, 0.0)
        z[x[1:3]] = y[x[:2]]
        z = z.to(torch.bfloat16).index_fill_(0, x[:1], 1.0)
        uploaded = torch.tensor([1, 2]).to(x.device, non_blocking=True)
        parts = z.split([1, 3])
    assert z.tolist() == [1, 0, 1, 0]
    assert uploaded.tolist() == [1, 2]
    assert len(parts) == 2


def test_tensors_of_the_host_may_be_read():
    host, device = torch.arange(3), torch.arange(3)
    with no_device_reads([host]):
        assert host.tolist() == [0, 1, 2]
        with pytest.raises(DeviceRead):
            device.tolist()


def test_the_guard_is_gone_afterwards():
    with no_device_reads():
        pass
    assert torch.arange(3).tolist() == [0, 1, 2]
    assert bool(torch.tensor(True))
    assert "tolist" not in vars(Tensor)
