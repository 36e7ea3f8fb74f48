"""Host integers to the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def upload(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Bring several lists of integers to the device in one copy that the host does not wait for."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64, pin_memory=device.type == "cuda")
    return list(flat.to(device, non_blocking=True).split([len(values) for values in lists]))
