"""The manager on vLLM's block pool, without a scheduler; S = 4 and a page is written by each `compute`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_armt.core import Segmentation
from vllm_armt.integration.cache import SegmentManager, SegmentSpec

S = 4
init_none_hash(sha256)


class Cache:
    """A manager and its pool, driven in the order in which vLLM's `allocate_slots` calls them."""

    def __init__(
        self, pages: int, segment_size: int = S, segmentation: Segmentation | None = None, events: bool = False
    ) -> None:
        self.S = segment_size
        self.pool = BlockPool(
            pages + 1, enable_caching=True, hash_block_size=segment_size, enable_kv_cache_events=events
        )
        self.manager = SegmentManager(
            SegmentSpec.create(segment_size, 256),
            self.pool,
            enable_caching=True,
            kv_cache_group_id=0,
            scheduler_block_size=segment_size,
        )
        self.segmentation = segmentation or Segmentation(segment_size)
        self.manager.segmentation_of = lambda request_id: self.segmentation

    def request(self, text: bytes, name: str = "r") -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=list(text),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.S, sha256),
        )

    def hit(self, request: Request):
        (blocks,), length = self.manager.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1, [0], self.pool, self.manager.kv_cache_spec, False, self.S
        )
        return blocks, length

    def needed(self, request: Request, end: int, blocks=(), local=None, **options) -> int:
        start = request.num_computed_tokens
        local = start if local is None else local
        return self.manager.get_num_blocks_to_allocate(request.request_id, end, blocks, start, local, end, **options)

    def compute(self, request: Request, end: int, blocks=(), local=None, publish: bool = True):
        """Compute up to `end`, of which `blocks` and what a connector brings beyond `local` are there already."""
        self.manager.new_step_starts()
        name, start = request.request_id, request.num_computed_tokens
        local = start if local is None else local
        self.manager.remove_skipped_blocks(name, start)
        free = self.pool.get_num_free_blocks()
        needed = self.needed(request, end, blocks, local)
        if name not in self.manager.req_to_blocks or not self.manager.req_to_blocks[name]:
            self.manager.add_local_computed_blocks(name, blocks, local, start - local)
            if start > local:
                self.manager.allocate_external_computed_blocks(name, local, start - local)
        new = self.manager.allocate_new_blocks(name, end, end)
        assert free - self.pool.get_num_free_blocks() == needed, "the estimate is not what is taken"
        self.manager.cache_blocks(request, end, replay_boundaries=())
        if publish:
            self.manager.publish()
        request.num_computed_tokens = end
        return new

    def columns(self, request: Request) -> list[int]:
        blocks = self.manager.req_to_blocks[request.request_id]
        return [column for column, block in enumerate(blocks) if not block.is_null]


def adopt(cache: Cache, request: Request):
    blocks, request.num_computed_tokens = cache.hit(request)
    return blocks


def segmentations(S: int, tokens: int) -> st.SearchStrategy[Segmentation]:
    """Of a request whose prompt is within so many tokens."""
    cuts = st.sampled_from([("left", False), ("left", True), ("right", True), ("center", True)])
    return st.builds(
        lambda cut, prompt: Segmentation.of_prompt(S, cut[0], cut[1], prompt), cuts, st.integers(1, tokens)
    )


@given(st.sampled_from([1, 3, 4, 14]), st.data())
def test_a_request_holds_the_page_it_reads_and_those_it_writes(segment_size, data):
    segmentation = data.draw(segmentations(segment_size, 20 * segment_size))
    cache = Cache(21, segment_size, segmentation)
    request = cache.request(bytes(20 * segment_size))
    while (start := request.num_computed_tokens) < request.num_tokens:
        # a chunk that starts inside a segment stays in it
        beyond = segmentation.end(start)
        is_inside = beyond is not None and start > segmentation.begin(segmentation.segment(start))
        end = data.draw(st.integers(start + 1, beyond if is_inside else request.num_tokens))
        new = cache.compute(request, end)
        table = cache.manager.req_to_blocks[request.request_id]
        retained = segmentation.retained(end, segment_size)
        assert len(table) == retained.stop
        assert table[len(table) - len(new) :] == new
        reads = {segmentation.segment(start) - 1}
        assert set(cache.columns(request)) == (reads | set(retained)) - {-1}
    cache.manager.free(request.request_id)
    assert cache.pool.get_num_free_blocks() == 21


def test_one_token_takes_one_page():
    cache = Cache(3)
    assert len(cache.compute(cache.request(b"a"), 1)) == 1


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (4, 1), (8, 2), (12, 3), (1_000_000, 3)])
def test_admission_asks_for_three_pages_at_most(tokens, pages):
    cache = Cache(3)
    assert cache.needed(cache.request(b"a"), tokens, apply_admission_cap=True) == pages


@pytest.mark.parametrize(("tokens", "pages"), [(8, 2), (9, 3), (20, 3), (24, 4), (25, 5), (1000, 248)])
def test_admission_asks_for_all_keys_of_a_segment_that_stays_open(tokens, pages):
    # beside the keys the memory before them, and one that is read to get there
    cache = Cache(3, segmentation=Segmentation(S, last=4))
    assert cache.needed(cache.request(b"a"), tokens, apply_admission_cap=True) == pages


def test_what_lies_in_an_open_segment_is_not_entered():
    cache = Cache(9, segmentation=Segmentation(S, last=2))
    request = cache.request(b"x" * 24)
    for end in (12, 17, 24):
        cache.compute(request, end)
    longer = cache.request(b"x" * 40, "longer")
    assert cache.hit(longer)[1] == 8
    assert cache.columns(request) == [1, 2, 3, 4, 5]


def test_admission_counts_a_memory_that_leaves_the_free_list():
    cache = Cache(9)
    first = cache.request(b"x" * 40, "first")
    cache.compute(first, 40)
    again = cache.request(b"x" * 60, "again")
    blocks = adopt(cache, again)
    assert cache.needed(again, 60, blocks, apply_admission_cap=True) == 2
    cache.manager.free("first")
    assert cache.needed(again, 60, blocks, apply_admission_cap=True) == 3


def test_a_hit_is_one_page_with_null_blocks_before_it():
    cache = Cache(9)
    cache.compute(cache.request(b"x" * 41, "first"), 41)
    again = cache.request(b"x" * 60, "again")
    blocks = adopt(cache, again)
    assert again.num_computed_tokens == 40
    assert [block.is_null for block in blocks] == [True] * 9 + [False]
    new = cache.compute(again, 60, blocks)
    assert [block.is_null for block in new] == [True] * 3 + [False] * 2
    assert cache.columns(again) == [9, 13, 14]


def test_a_lookup_leaves_a_token_to_compute():
    cache = Cache(9)
    cache.compute(cache.request(b"x" * 40, "first"), 40)
    assert cache.hit(cache.request(b"x" * 40, "same"))[1] == 36
    assert cache.hit(cache.request(b"x" * 41, "longer"))[1] == 40
    assert cache.hit(cache.request(b"x" * 39 + b"y", "other"))[1] == 36
    assert cache.hit(cache.request(b"x" * 35 + b"yyyyyy", "early"))[1] == 0


def test_a_memory_is_found_once_the_step_that_writes_it_is_complete():
    cache = Cache(9)
    cache.compute(cache.request(b"x" * 40, "first"), 40, publish=False)
    other = cache.request(b"x" * 60, "other")
    assert cache.hit(other)[1] == 0
    cache.manager.publish()
    assert cache.hit(other)[1] == 40


def test_a_memory_is_not_found_if_its_request_left_the_step():
    cache = Cache(9)
    request = cache.request(b"x" * 60)
    cache.compute(request, 20)
    cache.compute(request, 40, publish=False)
    cache.manager.free(request.request_id)
    cache.manager.publish()
    assert cache.hit(request)[1] == 20


def test_generated_segments_are_entered_when_their_tokens_are_known():
    cache = Cache(9)
    request = cache.request(b"x" * 7)
    cache.compute(request, 7)
    request.append_output_token_ids(5)
    cache.manager.cache_blocks(request, 8, replay_boundaries=())
    assert cache.hit(cache.request(b"x" * 7 + b"\x05\x05", "next"))[1] == 8


def test_a_preempted_request_starts_afresh():
    cache = Cache(3)
    request = cache.request(b"x" * 60)
    cache.compute(request, 40)
    cache.manager.free(request.request_id)
    cache.pool.reset_prefix_cache()
    request.num_computed_tokens = 0
    for end in (8, 16, 24):
        cache.compute(request, end)
    assert cache.columns(request) == [3, 4, 5]


def test_a_connector_is_given_one_page_at_the_column_of_its_memory():
    cache = Cache(9)
    request = cache.request(b"x" * 50)
    request.num_computed_tokens = 40
    assert cache.needed(request, 40, local=0) == 1
    cache.compute(request, 50, local=0)
    assert cache.columns(request) == [9, 11, 12]
    assert cache.hit(cache.request(b"x" * 42, "next"))[1] == 40


def test_the_newest_memory_is_evicted_last():
    cache = Cache(4)
    cache.compute(cache.request(b"x" * 40, "first"), 40)
    cache.manager.free("first")
    longer = cache.request(b"x" * 60, "longer")
    assert cache.hit(longer)[1] == 40
    cache.pool.get_new_blocks(3)
    assert cache.hit(longer)[1] == 40
    cache.pool.get_new_blocks(1)
    assert cache.hit(longer)[1] == 0


def test_pages_are_freed_once_and_null_blocks_never():
    cache = Cache(9)
    request = cache.request(b"x" * 60)
    cache.compute(request, 30)
    cache.manager.free(request.request_id)
    cache.manager.free(request.request_id)
    assert cache.pool.get_num_free_blocks() == 9
    assert cache.pool.null_block.ref_cnt == 0


def test_vllms_events_still_list_columns_without_a_page():
    """Why `--kv-events-config` is refused; when this fails, vLLM's events tell of pages alone and can be allowed."""
    cache = Cache(9, events=True)
    request = cache.request(b"x" * 41)
    cache.compute(request, 40)
    (stored,) = cache.pool.take_events()
    # two memories are kept, but the tokens are those of ten segments
    assert (len(stored.block_hashes), len(stored.token_ids)) == (2, 40)
    cache.pool.emit_cached_block_events(request, 10, S, 0)
    (reused,) = cache.pool.take_events()
    assert len(reused.block_hashes) == 10
