"""A page as tensors of all layers, independent of where it lies in a pool and of how many ranks share the model.

What a segment leaves is the same on every rank. Keys that the next segment sees through a window are sharded by head:
they are gathered when a page is copied out, and each rank takes its own when one is copied in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from vllm_armt.core import SegmentLayout
from vllm_armt.core.pages import LayerPages
from vllm_armt.integration.builder import PagedLayer
from vllm_armt.memories.disk.tensorfile import Spec


class PageTensors:
    """Pages of a pool, copied out and in; on the device's current stream, without waiting for it.

    Args:
        layers: of the model, in order.
        layout: of a segment.
        kv_heads: of the whole model.
        rank, ranks: of the tensor-parallel group.

    Attributes:
        spec: dtype and shape of a page's tensors: by layer what a segment leaves, and with a window "k" and "v"
            `[kv_heads, S, head_dim]` of its tokens.
    """

    def __init__(
        self, layers: Sequence[PagedLayer], layout: SegmentLayout, kv_heads: int, rank: int, ranks: int
    ) -> None:
        self._layers, self._kv_heads, self._rank, self._ranks = layers, kv_heads, rank, ranks
        self._tokens = slice(layout.prefix, layout.prefix + layout.tokens)
        page = layers[0].layout
        self._keys_stay = page.keys_stay
        one = {name: (tensor.dtype, tensor.shape) for name, tensor in page.state.items()}
        if page.keys_stay:
            one |= dict.fromkeys("kv", (page.kv_dtype, (kv_heads, layout.tokens, page.head_dim)))
        self.spec: Spec = {f"layers.{i}.{name}": tensor for i in range(len(layers)) for name, tensor in one.items()}

    @property
    def is_cuda(self) -> bool:
        return self._layers[0].kv_cache.is_cuda

    @property
    def bytes(self) -> int:
        """Of one page on the host."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.spec.values())

    def copy_out(self, block: int) -> dict[str, Tensor]:
        """A page on the host, complete once the device has come so far; pinned where there is a GPU.

        All ranks call it; only the first gets the tensors, the others nothing.
        """
        keys = self._gathered_keys(block) if self._keys_stay else None
        if self._rank:
            return {}
        on_device = {
            f"layers.{i}.{name}": state[block]
            for i, pages in enumerate(self._pages())
            for name, state in pages.state.items()
        }
        if keys is not None:
            on_device |= {f"layers.{i}.{name}": keys[i][j] for i in range(len(keys)) for j, name in enumerate("kv")}
        host = {}
        for name, tensor in on_device.items():
            host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[name].copy_(tensor, non_blocking=True)
        return host

    def copy_in(self, block: int, host: Mapping[str, Tensor]) -> None:
        """Fill a page of the pool from what `copy_out` gave."""
        for i, pages in enumerate(self._pages()):
            for name, state in pages.state.items():
                state[block].copy_(host[f"layers.{i}.{name}"], non_blocking=True)
            if self._keys_stay:
                first = self._rank * self._kv_heads // self._ranks
                for name, keys in (("k", pages.k), ("v", pages.v)):
                    own = host[f"layers.{i}.{name}"][first : first + keys.shape[1]]
                    keys[block][:, self._tokens].copy_(own, non_blocking=True)

    def _pages(self) -> list[LayerPages]:
        pages = [layer.pages for layer in self._layers]
        assert all(page is not None for page in pages), "vLLM binds the pool before the first step"
        return pages  # type: ignore[return-value]

    def _gathered_keys(self, block: int) -> Tensor | None:
        """Keys and values `[layers, 2, kv_heads, S, head_dim]` of all heads, on the first rank."""
        own = torch.stack([keys[block][:, self._tokens] for page in self._pages() for keys in (page.k, page.v)])
        if self._ranks == 1:
            return own.unflatten(0, (-1, 2))
        gathered = get_tp_group().gather(own, dst=0, dim=1)
        if gathered is None:
            return None
        # where there are more ranks than heads, several hold the same
        return gathered[:, :: max(self._ranks // self._kv_heads, 1)].unflatten(0, (-1, 2))
