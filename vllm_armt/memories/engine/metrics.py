"""What the scheduler counts of memories that last; `integration.metrics` sends it to the server."""

from __future__ import annotations

COUNTERS = {
    "memory_uses": "Requests that went on from a memory.",
    "memory_tokens_not_read": "Tokens of closed segments that memories stood for, which were not read again.",
    "memory_refusals": "Requests that asked something of memories that could not be done.",
    "memory_loads": "Pages of memories that were brought from disk for a request.",
    "memory_load_failures": "Requests that failed because the page of their memory could not be read.",
    "memory_pool_hits": "Requests whose memory was still in the cache's pool, or had no page.",
    "memory_saves": "Memories, and checkpoints of memories in progress, that were saved.",
    "memory_save_failures": "Memories that could not be saved.",
    "memory_prefix_loads": "Pages of ordinary prompts that were brought from disk.",
    "memory_prefix_saves": "Pages of ordinary prompts that were saved.",
}
"""By name; in Prometheus they are `vllm:armt_..._total`."""
