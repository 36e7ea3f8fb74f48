"""Attention by torch's scaled dot product, on any device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.upload import upload


@dataclass(frozen=True)
class Batch:
    """Pieces of similar length that run as one padded batch.

    Padding repeats a piece's last row; it comes after the valid rows, so nothing valid sees it.

    Attributes:
        gather: `[pieces, width]`, local rows.
        valid: `[rows]`, the places of `gather`, flattened, that are not padding; their local rows are `rows`.
        pages: `[pieces]`, with the earlier keys of their segments; None where there are none.
        past_width: columns of the pages that are needed.
        mask: bool `[pieces, width, past_width + width]`, with `pages`.
    """

    gather: Tensor
    valid: Tensor
    rows: Tensor
    pages: Tensor | None
    past_width: int
    mask: Tensor | None


@dataclass(frozen=True)
class Stores:
    """Where the keys and values of segments that stay open go.

    Attributes:
        opened: pages of the segments that begin here; None if none does.
        rows, pages, columns: `[stored rows]`, local rows and their places.
    """

    opened: Tensor | None
    rows: Tensor
    pages: Tensor
    columns: Tensor


@dataclass(frozen=True)
class OpenBatches:
    """The open pieces of a step: `batches` cover every local row once; `stores` is None if nothing stays open."""

    batches: list[Batch]
    stores: Stores | None


class SDPAttention:
    """The backend `sdpa`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, cell_rows: int) -> None:
        self.device = device

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Why it can't be used; it always can."""
        return ""

    def cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, cell_rows)) for x in (q, k, v))
        return attend_causally(q, k, v).flatten(0, 1)

    def index(self, rows: LocalRows) -> OpenBatches:
        kinds: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, (piece, width) in enumerate(zip(rows.pieces, rows.widths, strict=True)):
            kinds[width.bit_length(), piece.offset > 0].append(i)
        batches = [_batch(rows, members) for members in kinds.values()]
        return OpenBatches(batches, None if rows.block_table is None else _stores(rows))

    def open_rows(self, index: OpenBatches, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for batch in index.batches:
            q_b, k_b, v_b = q[batch.gather], k[batch.gather], v[batch.gather]
            if batch.pages is None:
                attended = attend_causally(q_b, k_b, v_b)
            else:
                assert pages is not None
                assert batch.mask is not None
                past_k, past_v = (x[:, :, : batch.past_width][batch.pages].transpose(1, 2) for x in (pages.k, pages.v))
                attended = attend_past(q_b, torch.cat([past_k, k_b], 1), torch.cat([past_v, v_b], 1), batch.mask)
            o[batch.rows] = attended.flatten(0, 1)[batch.valid]
        if index.stores is not None:
            assert pages is not None
            _store(pages, index.stores, k, v)
        return o


def _batch(rows: LocalRows, members: list[int]) -> Batch:
    """Pieces of one kind: all or none have a past."""
    widths = [rows.widths[i] for i in members]
    past = [rows.pieces[i].offset for i in members]
    width, past_width = max(widths), max(past)
    gather = [rows.starts[i] + min(j, rows.widths[i] - 1) for i in members for j in range(width)]
    valid = [p * width + j for p, w in enumerate(widths) for j in range(w)]
    gather_, valid_, past_ = upload([gather, valid, past], rows.device)
    return Batch(
        gather_.view(-1, width),
        valid_,
        gather_[valid_],
        rows.pages(members) if past_width else None,
        past_width,
        past_mask(past_, past_width, width) if past_width else None,
    )


def _stores(rows: LocalRows) -> Stores | None:
    staying = [i for i, piece in enumerate(rows.pieces) if not piece.closes]
    if not staying:
        return None
    local = [rows.starts[i] + j for i in staying for j in range(rows.widths[i])]
    columns = [rows.columns[row] for row in local]
    local_, columns_ = upload([local, columns], rows.device)
    opened = [i for i in rows.opening if not rows.pieces[i].closes]
    pages = rows.pages([i for i in staying for _ in range(rows.widths[i])])
    return Stores(rows.pages(opened) if opened else None, local_, pages, columns_)


def _store(pages: LayerPages, stores: Stores, k: Tensor, v: Tensor) -> None:
    for target, source in ((pages.k, k), (pages.v, v)):
        if stores.opened is not None:
            # masked columns are multiplied by zero, and what lies in a used page may be read as NaN
            target[stores.opened] = 0
        target.transpose(1, 2)[stores.pages, stores.columns] = source[stores.rows]


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each of n sequences.

    Args:
        q: `[n, T, heads, head_dim]`.
        k, v: `[n, T, kv_heads, head_dim]`.

    Returns:
        `[n, T, heads * head_dim]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).flatten(2)


def past_mask(past: Tensor, past_width: int, width: int) -> Tensor:
    """Which columns the rows of open segments see: their own past, then themselves causally.

    Args:
        past: `[pieces]`, tokens of each segment that lie in its page.
        past_width: columns of page keys, at least `past.max()`.
        width: rows of a piece.

    Returns:
        bool `[pieces, width, past_width + width]`.
    """
    columns = torch.arange(past_width, device=past.device)
    seen_past = (columns < past.unsqueeze(1)).unsqueeze(1).expand(-1, width, -1)
    own = torch.ones(width, width, dtype=torch.bool, device=past.device).tril()
    return torch.cat([seen_past, own.expand(past.shape[0], -1, -1)], dim=2)


def attend_past(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of a few rows over many keys under a mask.

    The query heads that share a key head become rows of one product, so keys are not repeated.

    Args:
        q: `[pieces, width, heads, head_dim]`.
        k, v: `[pieces, columns, kv_heads, head_dim]`.
        mask: bool `[pieces, width, columns]`.

    Returns:
        `[pieces, width, heads * head_dim]`.
    """
    pieces, width, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    share = heads // kv_heads
    q = q.unflatten(2, (kv_heads, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    mask = mask.repeat_interleave(share, dim=1).unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.unflatten(2, (width, share)).permute(0, 2, 1, 3, 4).reshape(pieces, width, heads * head_dim)
