"""The mathematics of recurrent memory in plain torch: nothing here knows vLLM or transformers.

Symbols, used in code, docs and tests alike (ARMT paper, arXiv 2407.04841):

| symbol | shape | meaning |
|---|---|---|
| S, m | | tokens of a segment; memory tokens appended to it |
| d, p, K | | hidden size; `d_mem`; K = 6p, the width of the feature map |
| phi | p -> K | feature map (DPFP with nu = 3) of queries and keys |
| M, z | [K, d], [K] | associative memory of one layer and its normaliser |
| q, A | [T, K], [T, d] | memory queries of a cell's rows and what they read |
| k, v | [m, K], [m, d] | keys and values that a segment's memory tokens write |
| beta, gamma | [m, 1] | strength of a write to M; correction of a write to z |
"""

from vllm_armt.core.memory import MemoryRule
from vllm_armt.core.segments import Piece, Segmentation, SegmentLayout, Window

__all__ = ["MemoryRule", "Piece", "SegmentLayout", "Segmentation", "Window"]
