"""The GEMM peak of this machine: the best rate of a large product, measured beside what is compared with it."""

from __future__ import annotations

import time

import torch
from vllm.platforms import current_platform

from vllm_armt.linear.choose import gemm_dtype

SIDES = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the factors. A GPU is through with a 2048-cube before it is measured."""

MAX_SECONDS = 1.0


class Peak:
    """Measures products of one dtype, in the type in which the device multiplies it.

    Clocks change while a machine works, so a sample belongs to its round.
    """

    def __init__(self, dtype: str) -> None:
        self.device = torch.device(current_platform.device_type)
        side = self.side = SIDES.get(self.device.type, SIDES["cuda"])
        factor = gemm_dtype(getattr(torch, dtype), self.device)
        self.a, self.b = (torch.randn(side, side, device=self.device, dtype=factor) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.sample()

    def sample(self, products: int = 5) -> float:
        """The best rate of some products, one at a time, in floating-point operations a second.

        Where products are slow there are fewer of them.
        """
        rate, end = 0.0, time.perf_counter() + MAX_SECONDS
        for _ in range(products):
            if rate and time.perf_counter() > end:
                break
            self._wait()
            begin = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            self._wait()
            rate = max(rate, 2 * self.side**3 / (time.perf_counter() - begin))
        return rate

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
