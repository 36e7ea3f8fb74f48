"""Host integers to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def upload(arrays: Sequence[ArrayLike], device: torch.device) -> list[Tensor]:
    """Bring several arrays of integers to the device, flat, in one copy that the host does not wait for."""
    if not arrays:
        return []
    parts = [np.asarray(values, dtype=np.int64).ravel() for values in arrays]
    flat = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(part) for part in parts]))
