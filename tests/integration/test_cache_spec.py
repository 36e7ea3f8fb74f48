import inspect
import pickle
import subprocess
import sys

import pytest
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import FullAttentionSpec, compute_layer_kv_cache_shape_bytes
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.support.simulation import MAX_MODEL_LEN, vllm_config
from vllm_armt.integration.cache import SegmentManager, SegmentSpec

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # before vLLM 0.33
    from vllm.v1.core import kv_cache_utils as planning

PAGE = 512


def configured(is_async: bool = False, segment_size: int = 1024):
    config = vllm_config(slots=4, budget=2048, is_async=is_async)
    config.cache_config.block_size = segment_size
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


@pytest.mark.parametrize("segment_size", [1, 14, 16, 18, 1024])
def test_a_page_is_its_bytes_whatever_the_segment_size(segment_size):
    spec = SegmentSpec.create(segment_size, PAGE)
    assert spec.page_size_bytes == PAGE
    assert compute_layer_kv_cache_shape_bytes(spec, num_blocks=5) == (5, 1, 1, PAGE)
    assert spec.max_num_blocks_per_req(configured(), segment_size * 7 + 1) == 8


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_segments_that_are_not_blocks_may_take_a_column_more(alignment):
    config = vllm_config(slots=4, budget=2048, generation_policy="open", segment_alignment=alignment)
    assert SegmentSpec.create(16, PAGE).max_num_blocks_per_req(config, 16 * 7 + 1) == 9


@pytest.mark.parametrize("size", [0, -256, 100, 257])
def test_a_page_that_no_dtype_fits_is_refused(size):
    with pytest.raises(ValueError, match="multiples of 256 bytes"):
        SegmentSpec.create(16, size)


@pytest.mark.parametrize(("is_async", "pages"), [(False, 3), (True, 5)])
def test_a_request_of_any_length_needs_a_few_pages(is_async, pages):
    assert SegmentSpec.create(1024, PAGE).max_memory_usage_bytes(configured(is_async)) == pages * PAGE
    assert SegmentSpec.create(MAX_MODEL_LEN, PAGE).max_memory_usage_bytes(configured(is_async)) == PAGE


def test_all_layers_share_one_group_and_start_up_counts_whole_requests():
    config = configured()
    layers = {f"layer{i}": SegmentSpec.create(1024, PAGE) for i in range(4)}
    (group,) = groups = planning.get_kv_cache_groups(config, layers)
    assert group.layer_names == list(layers)
    wants_groups = "global_kv_cache_groups" in inspect.signature(planning.get_kv_cache_configs).parameters
    memory = [31 * len(layers) * PAGE]
    (cache,) = planning.get_kv_cache_configs(config, [layers], memory, *([groups] if wants_groups else []))
    assert cache.num_blocks == 31
    tokens, concurrency = get_kv_cache_capacity(config, cache)
    assert concurrency == pytest.approx(31 / 3)
    assert tokens == int(concurrency * MAX_MODEL_LEN)


def test_start_up_refuses_a_pool_that_one_request_does_not_fit():
    layers = {"layer": SegmentSpec.create(1024, PAGE)}
    planning.check_enough_kv_cache_memory(configured(), layers, 4 * PAGE)
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        planning.check_enough_kv_cache_memory(configured(), layers, 3 * PAGE)


def test_the_manager_is_registered_beside_vllm_s_own():
    spec = SegmentSpec.create(16, PAGE)
    assert KVCacheSpecRegistry.get_manager_class(spec) is SegmentManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is SegmentSpec
    assert KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(16, num_kv_heads=1, head_size=8, dtype=None))


def test_unpickling_a_spec_in_another_process_registers_its_manager():
    code = f"""
import pickle
spec = pickle.loads({pickle.dumps(SegmentSpec.create(16, PAGE))!r})
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
print(KVCacheSpecRegistry.get_manager_class(spec).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "SegmentManager"
