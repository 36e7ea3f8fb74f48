"""What vLLM is told about memory pages: their spec and their manager, registered on import.

vLLM sends the spec to its engine process; unpickling it there imports this package, and so registers it.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_armt.integration.cache.manager import SegmentManager
from vllm_armt.integration.cache.spec import SegmentSpec

# vLLM registers its own specs only while the registry is empty, so they have to come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(SegmentSpec, SegmentManager, uniform_type_base_spec=SegmentSpec)

__all__ = ["SegmentManager", "SegmentSpec"]
