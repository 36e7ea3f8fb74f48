"""vLLM's CUDA kernels that `flash_attn` calls, as their documentation has them, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends import fa_utils

from vllm_armt.attention.naive import attend, causal


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window_size: list[int] | None = None,
    block_table: Tensor | None = None,
    fa_version: int = 0,
) -> Tensor:
    """Of vllm/vllm_flash_attn/flash_attn_interface.py; scores are scaled by `head_dim ** -0.5`."""
    assert causal
    assert window_size is None or window_size[1] == 0
    reach = None if window_size is None else window_size[0] + 1
    assert cu_seqlens_q.dtype == torch.int32
    assert (cu_seqlens_k is None) != (seqused_k is None)
    assert (block_table is None) == (seqused_k is None)
    outputs = []
    for i, (begin, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        if block_table is not None and seqused_k is not None:
            assert (block_table.dtype, seqused_k.dtype) == (torch.int32, torch.int32)
            length, columns = int(seqused_k[i]), k.shape[1]
            pages = -(-length // columns)
            # the kernel reads whole pages, whose columns behind the sequence it multiplies by zero
            keys, values = (x[block_table[i, :pages]].flatten(0, 1) for x in (k, v))
        else:
            assert cu_seqlens_k is not None
            own = slice(*cu_seqlens_k[i : i + 2].tolist())
            keys, values = k[own], v[own]
            length = len(keys)
        assert end - begin <= max_seqlen_q
        assert length <= max_seqlen_k
        outputs.append(attend(q[begin:end], keys, values, _seen(end - begin, length, len(keys), reach)))
    return torch.cat(outputs).to(q.dtype).view(q.shape)


def _seen(rows: int, length: int, columns: int, reach: int | None) -> Tensor:
    """Of a sequence of `length` the causal mask of its last rows; no row sees the columns behind it."""
    return torch.cat(
        [causal(rows, length - rows, reach=reach), torch.zeros(rows, columns - length, dtype=torch.bool)], dim=1
    )


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Of vllm/_custom_ops.py: rows go to `slot // columns`, `slot % columns`."""
    assert kv_cache_dtype == "auto"
    assert slot_mapping.dtype == torch.int64
    columns = key_cache.shape[1]
    for cache, rows in ((key_cache, key), (value_cache, value)):
        cache[slot_mapping // columns, slot_mapping % columns] = rows


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them in the place of the kernels."""
    kernels: dict[str, Any] = {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "reshape_and_cache_flash": reshape_and_cache_flash,
        "get_flash_attn_version": lambda **shape: 3,
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(fa_utils, name, kernel, raising=False)
