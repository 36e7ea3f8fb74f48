"""Attention by torch's scaled dot product, on any device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_armt.attention.base import AttentionShape
from vllm_armt.attention.window import Past, first_seen
from vllm_armt.core.pages import LayerPages
from vllm_armt.plan.tails import Integers, Places, TailRows, padded, ranges
from vllm_armt.plan.upload import upload

LEAST_COLUMNS = 64
"""Of the pages that are looked at, at least, so that all short pasts are alike."""


@dataclass(frozen=True)
class Batch:
    """Pieces of similar length that run as one padded batch.

    Padding repeats a tail's last row; it comes after the valid rows, so nothing valid sees it.

    Attributes:
        gather: int64 `[tails, width]`, rows of the step's tails.
        valid: `[rows]`, the places of `gather`, flattened, that are not padding; they are the step's `rows`.
        window: `[tails]`, pages of the segments before, seen through a window; None where they aren't.
        pages: `[tails, n]`, with keys of their segments; None where those are all the tails' own.
        paged_width: columns of the pages that are looked at, one page's behind another's.
        own: whether the tails' own keys are seen beside those in pages, as they aren't stored there.
        mask: bool `[tails, width, columns]` over window, pages and own keys; None where all are own and causal.
    """

    gather: Tensor
    valid: Tensor
    rows: Tensor
    window: Tensor | None
    pages: Tensor | None
    paged_width: int
    own: bool
    mask: Tensor | None


@dataclass(frozen=True)
class TailBatches:
    """The tails of a step.

    Attributes:
        batches: cover every row once.
        stores: where keys and values go that are read again; None if there are none.
    """

    batches: list[Batch]
    stores: Places | None


class SDPAttention:
    """The backend `sdpa`."""

    name: ClassVar[str] = "sdpa"

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        self.device = device
        self.shape = shape
        self.tokens = slice(shape.layout.prefix, shape.layout.prefix + shape.layout.tokens)
        self._own = torch.empty(0, 0)
        self.first_seen = np.array(first_seen(shape.window, shape.layout) if shape.window else [], dtype=np.int64)

    @staticmethod
    def why_not(device: torch.device, shape: AttentionShape) -> str:
        """Why it can't be used; it always can."""
        return ""

    def attend_cells(self, q: Tensor, k: Tensor, v: Tensor, cell_rows: int, past: Past | None = None) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, cell_rows)) for x in (q, k, v))
        full = self.shape.layout.suffix if self.shape.layout.full_suffix else 0
        if past is None:
            first = cell_rows - full
            o = attend_causally(q[:, :first], k[:, :first], v[:, :first], self._local(first))
            # rows that see the whole cell need no mask
            return (torch.cat([o, attend(q[:, first:], k, v)], 1) if full else o).flatten(0, 1)
        own = self._causal(cell_rows)
        own[cell_rows - full :] = True
        mask = torch.cat([past.mask, own.expand(len(q), -1, -1)], 2)
        return attend_past(q, torch.cat([past.k, k], 1), torch.cat([past.v, v], 1), mask).flatten(0, 1)

    def build_metadata(self, rows: TailRows) -> TailBatches:
        kinds: dict[tuple[int, bool, bool, bool, bool], list[int]] = defaultdict(list)
        for i, (tail, width) in enumerate(zip(rows.tails, rows.widths.tolist(), strict=True)):
            has_past = tail.offset > 0
            sees_before = self.shape.window is not None and tail.segment > 0
            is_full = tail.closes and self.shape.layout.full_suffix
            kinds[width.bit_length(), has_past, has_past and not tail.closes, sees_before, is_full].append(i)
        batches = [self._batch(rows, np.array(members), *kind[2:]) for kind, members in kinds.items()]
        return TailBatches(batches, None if rows.block_table is None else self._stores(rows))

    def attend_tails(self, metadata: TailBatches, pages: LayerPages | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if metadata.stores is not None:
            assert pages is not None
            _store(pages, metadata.stores, k, v)
        o = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for batch in metadata.batches:
            q_b = q[batch.gather]
            if batch.mask is None:
                local = self._local(batch.gather.shape[1])
                attended = attend_causally(q_b, k[batch.gather], v[batch.gather], local)
            else:
                assert pages is not None
                attended = attend_past(q_b, self._seen(batch, pages.k, k), self._seen(batch, pages.v, v), batch.mask)
            o[batch.rows] = attended.flatten(0, 1)[batch.valid]
        return o

    def _seen(self, batch: Batch, paged: Tensor, own: Tensor) -> Tensor:
        """Keys (or values) that a batch sees, of the pool and of this step: `[tails, columns, kv_heads, head_dim]`."""
        seen = []
        if batch.window is not None:
            seen.append(paged[:, :, self.tokens][batch.window].transpose(1, 2))
        if batch.pages is not None and batch.pages.shape[1] == 1:
            seen.append(paged[:, :, : batch.paged_width][batch.pages[:, 0]].transpose(1, 2))
        elif batch.pages is not None:
            seen.append(paged[batch.pages].transpose(2, 3).flatten(1, 2)[:, : batch.paged_width])
        if batch.own:
            seen.append(own[batch.gather])
        # what decodes sees its segment alone, which is then copied once
        return torch.cat(seen, 1) if len(seen) > 1 else seen[0]

    def _batch(self, rows: TailRows, members: Integers, all_paged: bool, sees_before: bool, is_full: bool) -> Batch:
        """Pieces of one kind: all or none have a past, their own keys in pages, see the segment before, and end in rows
        that all see one another."""
        starts, widths, past = rows.starts[members], rows.widths[members], rows.pasts[members]
        paged = past + widths if all_paged else past
        within = padded(widths)
        width, paged_width = within.shape[1], self._looked_at(int(paged.max()))
        # a segment that never closes may have more rows than a cell; they see what its last one does
        last = self.shape.layout.rows - 1
        firsts = self.first_seen[np.minimum(past[:, None] + within, last)] if sees_before else []
        # in pages the last one that each row sees is itself, or the last of the past
        lasts = past[:, None] + (within if all_paged else -1)
        firsts_paged = past[:, None] + within - self.shape.reach + 1 if self.shape.reach and paged_width else []
        # of the tails' own rows the last one that each row sees
        ends = widths[:, None] - 1
        is_suffix = within > ends - rows.suffixes[members, None]
        own_lasts: Integers = np.where(is_suffix, ends, within) if is_full else np.empty(0, dtype=np.int64)
        places = ranges(np.arange(len(members)) * width, widths)
        gather, valid, local, lasts_, firsts_, firsts_paged_, own_lasts_ = upload(
            [starts[:, None] + within, places, ranges(starts, widths), lasts, firsts, firsts_paged, own_lasts],
            rows.device,
        )
        masks = []
        if sees_before:
            masks.append(torch.arange(self.shape.layout.tokens, device=rows.device) >= firsts_.view(-1, width, 1))
        if paged_width:
            columns = torch.arange(paged_width, device=rows.device)
            seen = columns <= lasts_.view(len(members), -1, 1)
            if self.shape.reach:
                seen = seen & (columns >= firsts_paged_.view(len(members), -1, 1))
            masks.append(seen.expand(-1, width, -1))
        if is_full:
            masks.append(torch.arange(width, device=rows.device) <= own_lasts_.view(-1, width, 1))
        elif not all_paged:
            masks.append(self._causal(width).expand(len(members), -1, -1))
        return Batch(
            gather.view(-1, width),
            valid,
            local,
            rows.pages(members, ahead=-1) if sees_before else None,
            rows.table(members, -(-paged // self.shape.columns)) if paged_width else None,
            paged_width,
            not all_paged,
            torch.cat(masks, 2) if sees_before or paged_width or is_full else None,
        )

    def _causal(self, rows: int) -> Tensor:
        """Which of them so many rows of a segment see, bool `[rows, rows]`."""
        seen = torch.ones(rows, rows, dtype=torch.bool, device=self.device).tril()
        return seen if self.shape.reach is None else seen.triu(1 - self.shape.reach)

    def _local(self, rows: int) -> Tensor | None:
        """The same where it differs from those before and themselves, else None."""
        if self.shape.reach is None or self.shape.reach >= rows:
            return None
        if len(self._own) < rows:
            self._own = self._causal(rows)
        return self._own[:rows, :rows]

    def _looked_at(self, paged: int) -> int:
        """`paged` columns, rounded up to a power of two or to whole pages, so that steps have equal shapes."""
        pages = -(-paged // self.shape.columns)
        return min(max(1 << (paged - 1).bit_length(), LEAST_COLUMNS), pages * self.shape.columns) if paged else 0

    def _stores(self, rows: TailRows) -> Places | None:
        """Keys of segments that stay open; with a window also those of the tokens of segments that close."""
        retained = np.flatnonzero(~rows.closes) if self.shape.window is None else np.arange(len(rows.tails))
        counts = rows.widths - rows.suffixes
        return rows.places(retained, counts[retained], self.shape.columns) if len(retained) else None


def _store(pages: LayerPages, stores: Places, k: Tensor, v: Tensor) -> None:
    for target, source in ((pages.k, k), (pages.v, v)):
        if stores.cleared is not None:
            # masked columns are multiplied by zero, and what lies in a used page may be read as NaN
            target.index_fill_(0, stores.cleared.long(), 0)
        target.transpose(1, 2)[stores.pages, stores.columns] = source[stores.rows]


def attend_causally(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention within each of n sequences.

    Args:
        q: `[n, T, heads, head_dim]`.
        k, v: `[n, T, kv_heads, head_dim]`.
        mask: bool `[T, T]`, where rows see less than all before them and themselves.

    Returns:
        `[n, T, heads * head_dim]`.
    """
    return attend(q, k, v, mask, is_causal=mask is None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention of n sequences to as many, unmasked by default; shapes as in `attend_causally`, but of two lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)
    return o.transpose(1, 2).flatten(2)


def attend_past(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of a few rows over many keys under a mask.

    The query heads that share a key head become rows of one product, so keys are not repeated.

    Args:
        q: `[tails, width, heads, head_dim]`.
        k, v: `[tails, columns, kv_heads, head_dim]`.
        mask: bool `[tails, width, columns]`.

    Returns:
        `[tails, width, heads * head_dim]`.
    """
    tails, width, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    share = heads // kv_heads
    q = q.unflatten(2, (kv_heads, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    mask = mask.repeat_interleave(share, dim=1).unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.unflatten(2, (width, share)).permute(0, 2, 1, 3, 4).reshape(tails, width, heads * head_dim)
