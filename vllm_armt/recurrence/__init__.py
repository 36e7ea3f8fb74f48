"""Recurrences: what flows from segment to segment.

| recurrence | file | around the tokens | flows |
|---|---|---|---|
| ARMT | `armt` | memory tokens behind, a sink before | M and z of every layer, to the same layer |
| PRMT | `prmt` | memory before and behind | memory of every layer |
| RMT | `rmt` | memory before and behind | memory of the top layer, to the first |
"""

from vllm_armt.recurrence.base import Recurrence, WaveState

__all__ = ["Recurrence", "WaveState"]
