"""Systems: what flows from segment to segment.

| system | file | around the tokens | flows |
|---|---|---|---|
| ARMT | `associative` | memory tokens behind, a sink before | M and z of every layer, to the same layer |
| PRMT | `layer_memory` | memory before and behind | memory of every layer |
| RMT | `top_memory` | memory before and behind | memory of the top layer, to the first |
"""

from vllm_armt.recurrence.base import States, System

__all__ = ["States", "System"]
