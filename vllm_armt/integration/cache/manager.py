"""SegmentManager: which pages a request holds, and from when on others can find the memory in them.

Column s of a request's block table is its segment s; a segment that never closes goes on in the columns
behind its own. Only columns that are read or written have a page, the others hold vLLM's null block. What is
written follows `Segmentation.retained`, as in the executor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_armt.core import Segmentation
from vllm_armt.integration.cache.latest import LatestMemories, Search
from vllm_armt.integration.cache.spec import PAGES_READ


@dataclass(slots=True)
class _Until:
    """How many tokens a request may have until something is to be done: vLLM asks for each request in each step.

    Attributes:
        closes: below it no further segment is closed.
        room: up to it the block table has the columns.
        retires: below it no further page is done with.
    """

    closes: float = 0
    room: float = 0
    retires: float = 0


class SegmentManager(SingleTypeKVCacheManager):
    """Gives requests their pages; the scheduler brackets each step with `new_step_starts` and `publish`.

    vLLM's own managers enter a block into the prefix cache while the step that writes it is still being
    put together. A page of ours could then be read by a request of the same step, before it is written,
    or be served for ever although its owner was preempted out of the step. Hence `publish`.

    Attributes:
        segmentation_of: where the segments of the request with this id lie. The scheduler sets this: they may depend
            on the prompt's length, vLLM calls a manager with a request's id alone, and it makes its managers, from
            their spec and the pool, within the scheduler's constructor.
    """

    segmentation_of: Callable[[str], Segmentation]

    def __init__(self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._scheduling = False
        self._unpublished: dict[str, partial[None]] = {}
        self._num_retired: dict[str, int] = {}
        self._until: defaultdict[str, _Until] = defaultdict(_Until)
        self._latest = LatestMemories(self.memory_after)
        self._num_entered = 0

    def new_step_starts(self) -> None:
        """Note that pages given out from now on are written by a step that is not yet certain."""
        self._scheduling = True

    def publish(self) -> None:
        """Enter what the step that is now complete will write into the prefix cache."""
        self._scheduling = False
        for cache in self._unpublished.values():
            cache()
        self._unpublished.clear()

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Enter the memories of the segments closed in `[0, num_tokens)` into the prefix cache, at `publish`."""
        until = self._until[request.request_id]
        if num_tokens < until.closes:
            return
        segmentation = self.segmentation_of(request.request_id)
        until.closes = _or_never(segmentation.end(num_tokens))
        closed = segmentation.closed_tokens(num_tokens)
        cache = partial(self._enter, request, closed, retention_interval, replay_boundaries=replay_boundaries)
        if self._scheduling:
            self._unpublished[request.request_id] = cache
        else:
            cache()

    def _enter(self, request: Request, closed: int, *args: Any, **kwargs: Any) -> None:
        """Enter memories now, and tell those that wait which are new."""
        first, held = self.num_cached_block.get(request.request_id, 0), self._num_held
        super().cache_blocks(request, closed, *args, **kwargs)
        self._num_entered += self._num_held - held
        blocks = self.req_to_blocks[request.request_id]
        entered = range(first, closed // self.block_size)
        self._latest.note(request.block_hashes, (column for column in entered if not blocks[column].is_null))

    @property
    def _num_held(self) -> int:
        """Memories in the prefix cache."""
        return len(self.block_pool.cached_block_hash_to_block)

    def take_num_evicted(self) -> int:
        """How many memories have left the prefix cache since this was last asked."""
        evicted, self._num_entered = self._num_entered - self._num_held, self._num_held
        return evicted

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """The free pages needed to compute tokens `[total_computed_tokens, num_tokens)`.

        They may be computed in one step or, with `apply_admission_cap`, in as many as it takes. Pages that
        are adopted count too: a memory found in the prefix cache leaves the free list, one that a connector
        brings needs a page to be brought to.
        """
        if not apply_admission_cap and num_tokens <= self._until[request_id].room:
            return 0
        columns = len(self.req_to_blocks.get(request_id, ())) or total_computed_tokens // self.block_size
        retained = self._retained(request_id, num_tokens)
        if apply_admission_cap:
            new = min(retained.stop - columns, len(retained) + (0 if columns else PAGES_READ))
        else:
            new = _num_new(retained, columns)
        brought = total_computed_tokens > num_local_computed_tokens
        return new + (1 if brought else self._get_num_evictable_blocks(new_computed_blocks[-1:]))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the block table to `num_tokens` and return the new columns.

        Null blocks are returned too: the worker appends what it gets, and a column is a segment.
        """
        until = self._until[request_id]
        if num_tokens <= until.room:
            return []
        self._latest.forget(request_id)
        blocks = self.req_to_blocks[request_id]
        retained = self._retained(request_id, num_tokens)
        pages = iter(self.block_pool.get_new_blocks(_num_new(retained, len(blocks))))
        new = [next(pages) if column in retained else self._null_block for column in range(len(blocks), retained.stop)]
        blocks.extend(new)
        until.room = self.segmentation_of(request_id).room(num_tokens, self.block_size)
        return new

    def _retained(self, request_id: str, num_tokens: int) -> range:
        return self.segmentation_of(request_id).retained(num_tokens, self.block_size)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens before the last memory, if the prefix cache has `num_computed_tokens`: a hit is whole blocks."""
        return max(num_computed_tokens // self.block_size - 1, 0) * self.block_size

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the pages that are not read any more: those before the memory that the next token reads."""
        until = self._until[request_id]
        if processed_computed_tokens < until.retires:
            return
        segmentation = self.segmentation_of(request_id)
        until.retires = _or_never(segmentation.end(processed_computed_tokens))
        self._remove_blocks_in_range(request_id, 0, segmentation.segment(processed_computed_tokens) - 1)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """Free the pages in columns `[first_block, last_block)`; vLLM's own stops at the first null block."""
        blocks = self.req_to_blocks.get(request_id, [])
        first = max(first_block, self._num_retired.get(request_id, 0))
        last = min(last_block, len(blocks))
        if first >= last:
            return
        retired = [block for block in blocks[first:last] if not block.is_null]
        blocks[first:last] = [self._null_block] * (last - first)
        self._num_retired[request_id] = last
        self.block_pool.free_blocks(retired)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return its pages, newest first.

        The caller frees them in reverse, and what is freed last is evicted last: the newest memory serves
        every continuation of the text, the one before it only a repetition.
        """
        self._unpublished.pop(request_id, None)
        self._num_retired.pop(request_id, None)
        self._until.pop(request_id, None)
        self._latest.forget(request_id)
        return [block for block in reversed(super().pop_blocks_for_free(request_id)) if not block.is_null]

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None, as nothing attends to a common beginning; vLLM 0.31 asks, later versions do not."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The latest memory of the text's first `max_length` tokens: one page, with null blocks before it."""
        find = partial(block_pool.get_cached_block, kv_cache_group_ids=kv_cache_group_ids)
        found = Search(block_hashes, max_length // kv_cache_spec.block_size, find).latest()
        if found is None:
            return tuple([] for _ in kv_cache_group_ids), 0
        segment, pages = found
        blocks = tuple(_alone(page, segment, block_pool.null_block) for page in pages)
        return blocks, (segment + 1) * kv_cache_spec.block_size

    def latest_memory(self, request: Request, num_segments: int) -> tuple[list[KVCacheBlock], int]:
        """What `find_longest_cache_hit` finds of a request that waits, without a walk through its text in every step.

        Args:
            request: it has no pages.
            num_segments: of its text that it can take from others.

        Returns:
            Blocks, and the tokens before the end of the last one.
        """
        found = self._latest.find(request.request_id, request.block_hashes, num_segments)
        if found is None:
            return [], 0
        segment, page = found
        return _alone(page, segment, self._null_block), (segment + 1) * self.block_size

    def memory_after(self, block_hash: BlockHash) -> KVCacheBlock | None:
        """The page with the memory after a segment, if the prefix cache has it."""
        pages = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
        return pages[0] if pages else None


def _alone(page: KVCacheBlock, column: int, null_block: KVCacheBlock) -> list[KVCacheBlock]:
    """A block table that ends with `page` in `column` and has nothing before it."""
    blocks = [null_block] * (column + 1)
    blocks[column] = page
    return blocks


def _num_new(retained: range, columns: int) -> int:
    """Pages that are kept beyond the `columns` that a block table has."""
    return sum(column >= columns for column in retained)


def _or_never(end: int | None) -> float:
    """The end of a segment, in tokens."""
    return math.inf if end is None else end
