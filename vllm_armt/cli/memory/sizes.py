"""`vllm-armt memory sizes`: what memories of models of all sizes take, beside the KV cache of the same text."""

from __future__ import annotations

from vllm_armt.cli.bench import options as bench
from vllm_armt.cli.memory import options
from vllm_armt.cli.values import whole_numbers

PAGES = 3
"""Of a request: the memory that it reads, and two that a step writes (`integration.cache`, which imports vLLM)."""


def sizes(
    shape: bench.Shapes = "llama-1b,llama-3b,llama-8b",
    model: bench.ModelDirectory = None,
    dtype: bench.Dtype = "bfloat16",
    segment_size: bench.SegmentSize = None,
    num_mem_tokens: bench.NumMemTokens = None,
    d_mem: bench.DMem = None,
    tokens: bench.Tokens = "10k,120k,1M",
    as_json: options.AsJson = False,
) -> None:
    """What a memory takes on disk, a request in the cache, whatever its text, and the base's KV cache for some texts.

    Shapes are ARMTs; --model may be of any system. The segment size is 1024 unless given: an ARMT's memory does not
    depend on it. A request has three pages (five where steps overlap, as on GPUs), each of the memory or the keys of a
    segment, whichever is larger.
    """
    lengths = whole_numbers("--tokens", tokens)
    models = bench.models_of_shapes(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "1024", any_system=True)

    from rich.box import MARKDOWN
    from rich.table import Table

    from vllm_armt.cli.memory.tables import print_json, print_table, size

    if as_json:
        caches = [{str(n): n * one.kv_bytes_per_token for n in lengths} for one in models]
        pairs = zip(models, caches, strict=True)
        print_json(
            [
                one.case
                | {"memory_bytes": one.state_bytes, "request_bytes": PAGES * one.page_bytes, "kv_cache_bytes": cache}
                for one, cache in pairs
            ]
        )
        return
    table = Table("shape", "dtype", "S", "m", "d_mem", box=MARKDOWN)
    for header in ("memory", "a request", *(f"KV cache of {n:,} tokens" for n in lengths)):
        table.add_column(header, justify="right", no_wrap=True)
    for one in models:
        segment = map(str, (one.segment_size, one.config.num_mem_tokens, one.d_mem or "-"))
        cells = [
            size(one.state_bytes),
            size(PAGES * one.page_bytes),
            *(size(n * one.kv_bytes_per_token) for n in lengths),
        ]
        table.add_row(one.name, one.dtype, *segment, *cells)
    print_table(table)
