"""Attention by torch's scaled dot product, on any device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_armt.cache.pages import LayerPages
from vllm_armt.diagonal.attention.base import AttentionShape
from vllm_armt.diagonal.local_rows import LocalRows
from vllm_armt.diagonal.upload import upload
from vllm_armt.diagonal.window import Past, first_seen


@dataclass(frozen=True)
class Batch:
    """Pieces of similar length that run as one padded batch.

    Padding repeats a piece's last row; it comes after the valid rows, so nothing valid sees it.

    Attributes:
        gather: `[pieces, width]`, local rows.
        valid: `[rows]`, the places of `gather`, flattened, that are not padding; their local rows are `rows`.
        window: `[pieces]`, pages of the segments before, seen through a window; None where they aren't.
        pages: `[pieces, n]`, with the earlier keys of their segments; None where there are none.
        past_width: columns of the pages that are needed, one page's behind another's.
        mask: bool `[pieces, width, columns]` over window, past and own keys; None where all are own.
    """

    gather: Tensor
    valid: Tensor
    rows: Tensor
    window: Tensor | None
    pages: Tensor | None
    past_width: int
    mask: Tensor | None


@dataclass(frozen=True)
class Stores:
    """Where keys and values go that are read again.

    Attributes:
        cleared: pages that are first written here; None if there is none.
        rows, pages, columns: `[stored rows]`, local rows and their places.
    """

    cleared: Tensor | None
    rows: Tensor
    pages: Tensor
    columns: Tensor


@dataclass(frozen=True)
class OpenBatches:
    """The open pieces of a step: `batches` cover every local row once; `stores` is None if no keys are kept."""

    batches: list[Batch]
    stores: Stores | None


class SDPAttention:
    """The backend `sdpa`."""

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        self.device = device
        self.shape = shape
        self.tokens = slice(shape.cell.prefix, shape.cell.prefix + shape.cell.tokens)

    @staticmethod
    def why_not(device: torch.device, shape: AttentionShape) -> str:
        """Why it can't be used; it always can."""
        return ""

    def cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, cell_rows)) for x in (q, k, v))
        if past is None:
            return attend_causally(q, k, v).flatten(0, 1)
        own = torch.ones(cell_rows, cell_rows, dtype=torch.bool, device=q.device).tril()
        mask = torch.cat([past.mask, own.expand(len(q), -1, -1)], 2)
        return attend_past(q, torch.cat([past.k, k], 1), torch.cat([past.v, v], 1), mask).flatten(0, 1)

    def index(self, rows: LocalRows) -> OpenBatches:
        kinds: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
        for i, (piece, width) in enumerate(zip(rows.pieces, rows.widths, strict=True)):
            sees_before = self.shape.window is not None and piece.segment > 0
            kinds[width.bit_length(), piece.offset > 0, sees_before].append(i)
        batches = [self._batch(rows, members, before) for (_, _, before), members in kinds.items()]
        return OpenBatches(batches, None if rows.block_table is None else self._stores(rows))

    def open_rows(self, index: OpenBatches, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for batch in index.batches:
            q_b, k_b, v_b = q[batch.gather], k[batch.gather], v[batch.gather]
            if batch.mask is None:
                attended = attend_causally(q_b, k_b, v_b)
            else:
                assert pages is not None
                keys, values = (
                    torch.cat([*self._past(batch, x), own], 1) for x, own in ((pages.k, k_b), (pages.v, v_b))
                )
                attended = attend_past(q_b, keys, values, batch.mask)
            o[batch.rows] = attended.flatten(0, 1)[batch.valid]
        if index.stores is not None:
            assert pages is not None
            _store(pages, index.stores, k, v)
        return o

    def _past(self, batch: Batch, keys: Tensor) -> list[Tensor]:
        """Keys (or values) of the pool that a batch sees, each `[pieces, columns, kv_heads, head_dim]`."""
        past = []
        if batch.window is not None:
            past.append(keys[:, :, self.tokens][batch.window].transpose(1, 2))
        if batch.pages is not None and batch.pages.shape[1] == 1:
            past.append(keys[:, :, : batch.past_width][batch.pages[:, 0]].transpose(1, 2))
        elif batch.pages is not None:
            past.append(keys[batch.pages].transpose(2, 3).flatten(1, 2)[:, : batch.past_width])
        return past

    def _batch(self, rows: LocalRows, members: list[int], sees_before: bool) -> Batch:
        """Pieces of one kind: all or none have a past, all or none see the segment before."""
        widths = [rows.widths[i] for i in members]
        past = [rows.past(i) for i in members]
        width, past_width = max(widths), max(past)
        gather = [rows.starts[i] + min(j, rows.widths[i] - 1) for i in members for j in range(width)]
        valid = [p * width + j for p, w in enumerate(widths) for j in range(w)]
        seen = first_seen(self.shape.window, self.shape.cell) if self.shape.window and sees_before else None
        # a segment that never closes may have more rows than a cell; they see what its last one does
        last = self.shape.cell.rows - 1
        firsts = [seen[min(rows.columns[row], last)] for row in gather] if seen is not None else []
        gather_, valid_, past_, firsts_ = upload([gather, valid, past, firsts], rows.device)
        own = torch.ones(width, width, dtype=torch.bool, device=rows.device).tril().expand(len(members), -1, -1)
        masks = [own]
        if past_width:
            masks.insert(0, (torch.arange(past_width, device=rows.device) < past_[:, None, None]).expand(-1, width, -1))
        if seen is not None:
            tokens = torch.arange(self.shape.cell.tokens, device=rows.device)
            masks.insert(0, tokens >= firsts_.view(len(members), width, 1))
        return Batch(
            gather_.view(-1, width),
            valid_,
            gather_[valid_],
            None if seen is None else rows.pages(members, ahead=-1),
            self._past_pages(rows, members, past) if past_width else None,
            past_width,
            torch.cat(masks, 2) if len(masks) > 1 else None,
        )

    def _past_pages(self, rows: LocalRows, members: list[int], past: list[int]) -> Tensor:
        """`[pieces, n]`: pages with the earlier keys of pieces' segments; a last one stands for those not there."""
        counts = [-(-p // self.shape.columns) for p in past]
        n = max(counts)
        ahead = [min(j, count - 1) for count in counts for j in range(n)]
        return rows.pages([i for i in members for _ in range(n)], ahead).view(-1, n)

    def _stores(self, rows: LocalRows) -> Stores | None:
        """Keys of segments that stay open; with a window also those of the tokens of segments that close."""
        suffix = set(rows.suffix_rows(rows.closing))
        owners = [
            (i, row)
            for i, (start, width) in enumerate(zip(rows.starts, rows.widths, strict=True))
            if self.shape.window is not None or not rows.pieces[i].closes
            for row in range(start, start + width)
            if row not in suffix
        ]
        if not owners:
            return None
        places = [divmod(rows.columns[row], self.shape.columns) for _, row in owners]
        local, columns = upload([[row for _, row in owners], [column for _, column in places]], rows.device)
        new = [(i, ahead) for (i, _), (ahead, column) in zip(owners, places, strict=True) if column == 0]
        pages = rows.pages([i for i, _ in owners], [ahead for ahead, _ in places])
        cleared = rows.pages([i for i, _ in new], [ahead for _, ahead in new]) if new else None
        return Stores(cleared, local, pages, columns)


def _store(pages: LayerPages, stores: Stores, k: Tensor, v: Tensor) -> None:
    for target, source in ((pages.k, k), (pages.v, v)):
        if stores.cleared is not None:
            # masked columns are multiplied by zero, and what lies in a used page may be read as NaN
            target[stores.cleared] = 0
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
