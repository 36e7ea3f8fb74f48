"""What a scheduler counts of segments and of the prefix cache, and how it comes to a server: see `prometheus`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm.v1.metrics.stats import SchedulerStats

from vllm_armt.core import Segmentation

COUNTERS = {
    "segments_read": "Segments of texts that were read and closed.",
    "segments_decoded": "Segments that were closed by generated tokens.",
    "cells": "Cells (segment, layer) of whole segments, which run in diagonals unless the schedule is sequential.",
    "prefix_memories_found": "Requests that went on from a memory in the prefix cache.",
    "prefix_memories_missed": "Requests that could have, had the prefix cache a memory of their beginning.",
    "prefix_memories_evicted": "Memories that left the prefix cache.",
    "prefix_tokens_not_read": "Tokens of prompts that were not read again, as a memory in the prefix cache held them.",
}
"""Of the scheduler, by name; in Prometheus they are `vllm:armt_..._total`."""


def put(stats: SchedulerStats, counts: Mapping[str, int]) -> None:
    """Send counts to the server.

    vLLM keeps room for the counts of KV connectors, and takes it apart with the connector's class, which there is none
    of where no memories are kept. LoRA adapters are refused, so the numbers of their requests are free.
    """
    stats.running_lora_adapters.update(counts)


def take(stats: SchedulerStats) -> dict[str, int]:
    """What `put` has sent; afterwards it is gone."""
    counts, stats.running_lora_adapters = stats.running_lora_adapters, {}
    return counts


class Counts:
    """What a scheduler has counted since it was last asked, by the names of `COUNTERS`.

    Args:
        segment_size: S.
        num_layers: L.
    """

    def __init__(self, segment_size: int, num_layers: int) -> None:
        self._segment_size, self._num_layers = segment_size, num_layers
        self._counts: Counter[str] = Counter()

    def compute(self, start: int, end: int, segmentation: Segmentation, is_decoded: bool) -> None:
        """A step computes the tokens `[start, end)` of a text; whether they were generated, or are read."""
        before, after = segmentation.closed(start), segmentation.closed(end)
        self._counts["segments_decoded" if is_decoded else "segments_read"] += after - before
        if segmentation.size == self._segment_size:
            # what began in a step before, or is the text's short beginning, runs beside the wave
            is_part = start > segmentation.begin(before) or (before == 0 and segmentation.lead > 0)
            self._counts["cells"] += max(after - before - is_part, 0) * self._num_layers

    def look_up(self, found_tokens: int) -> None:
        """The prefix cache was asked for a new request, and has a memory of so many of its tokens."""
        self._counts["prefix_memories_found" if found_tokens else "prefix_memories_missed"] += 1
        self._counts["prefix_tokens_not_read"] += found_tokens

    def evict(self, memories: int) -> None:
        """So many memories have left the prefix cache."""
        self._counts["prefix_memories_evicted"] += memories

    def take(self) -> dict[str, int]:
        """The counts that are not 0; they begin anew."""
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}
