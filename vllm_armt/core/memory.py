"""The associative memory of one layer: feature map, read and write (ARMT paper, equations 2 to 7).

All functions are batched over any leading dimensions `*` and differentiable. They follow the
sequential definition of the authors' code; the first-segment rule is part of it. With several heads each is
a memory of its own, and the heads are the last of the leading dimensions: see `split_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NU = 3
"""Number of rolled products in the feature map; the authors never use another value."""

EPS = 1e-5
"""Added to q.z and k.z, and in v1 also to ||k||^2."""


@dataclass(frozen=True)
class MemoryRule:
    """How a checkpoint reads and writes its memory; none of it can be seen in the weights.

    Attributes:
        normalize: divide phi by its L2 norm (v2 and newer); v1 does not.
        correction: scale the write to z by gamma, so that a key written again is not counted twice.
        use_denom: keep the normaliser z at all. Without it reads are `q M` and `correction` is moot.
        heads: h, memories side by side; each has p/h of the queries and keys and d/h of the values.
    """

    normalize: bool = True
    correction: bool = True
    use_denom: bool = True
    heads: int = 1

    @staticmethod
    def feature_size(p: int) -> int:
        """K, the features of p queries or keys."""
        return 2 * NU * p

    def split_heads(self, x: Tensor) -> Tensor:
        """`[*, T, c] -> [*, h, T, c/h]`: features, values, rows or beta by head; a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """`[*, h, T, c/h] -> [*, T, c]`."""
        return x.transpose(-3, -2).flatten(-2)

    def phi(self, u: Tensor) -> Tensor:
        """DPFP feature map, `[*, p] -> [*, 6p]`, in the dtype of `u`; of each head by itself."""
        if self.heads > 1:
            return self._phi(u.unflatten(-1, (self.heads, -1))).flatten(-2)
        return self._phi(u)

    def _phi(self, u: Tensor) -> Tensor:
        # [x, x] with x = [relu(u), relu(-u)]: x rolled by j is a window of it
        negative = -u
        twice = F.relu(torch.cat([u, negative, u, negative], dim=-1))
        size = 2 * u.shape[-1]
        x = twice[..., :size]
        x = torch.cat([x * twice.narrow(-1, -j % size, size) for j in range(1, NU + 1)], dim=-1)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12) if self.normalize else x

    def weights(self, q: Tensor, z: Tensor) -> Tensor:
        """How the rows weigh the rows of M: `w = q / (q.z + eps)`, so that they read `A = w M`.

        Args:
            q: features `phi(W_mq h)`, `[*, T, K]`.
            z: `[*, K]`; ignored without `use_denom`.

        Returns:
            w `[*, T, K]`, in the dtype of q.
        """
        if not self.use_denom:
            return q
        z = z.to(q.dtype).unsqueeze(-1)
        # for a single row a product of matrices takes longer to set up than to compute
        found = q @ z if q.shape[-2] > 1 else (q * z.mT).sum(-1, keepdim=True)
        return q / (found + EPS)

    def read(self, q: Tensor, M: Tensor, z: Tensor) -> Tensor:
        """What the rows read: `A = q M / (q.z + eps)`.

        Args:
            q: features `phi(W_mq h)`, `[*, T, K]`, in the dtype of M.
            M: `[*, K, d]`.
            z: `[*, K]`; ignored without `use_denom`.

        Returns:
            A `[*, T, d]`; exactly zero for an empty memory.
        """
        return self.weights(q, z) @ M

    def update(
        self, k: Tensor, v: Tensor, beta: Tensor, prev: Tensor, z: Tensor, first: Tensor | bool
    ) -> tuple[Tensor, Tensor]:
        """The two terms of a segment's write: `M <- M + k^T residual`, `z <- z + dz`.

        All m memory tokens of a segment see the old M and z (parallel, not one after the other).

        Args:
            k: features `phi(W_mk o)`, `[*, m, K]`, in the dtype of z.
            v: values `W_mv o`, `[*, m, d]`.
            beta: `sigmoid(W_mb o + b)`, `[*, m, 1]`.
            prev: what the keys find so far, `k M`, `[*, m, d]`.
            z: `[*, K]`, zero for a first segment.
            first: whether this is a document's first segment, where gamma is 1; a bool or `[*]`.

        Returns:
            residual `beta (v - prev)` `[*, m, d]` and dz `[*, K]` (zero without `use_denom`).
        """
        if not self.use_denom:
            return beta * (v - prev), torch.zeros_like(z)
        den = k @ z.unsqueeze(-1) + EPS
        residual = beta * (v - prev / den)
        if not self.correction:
            return residual, k.sum(dim=-2)
        norm2 = torch.linalg.vecdot(k, k).unsqueeze(-1)
        if not self.normalize:
            norm2 = norm2 + EPS
        gamma = (1 - den / norm2).clamp(0, 1).detach()
        if isinstance(first, Tensor):
            gamma = torch.where(first[..., None, None], 1.0, gamma)
        elif first:
            gamma = torch.ones_like(gamma)
        return residual, (gamma * k).sum(dim=-2)
