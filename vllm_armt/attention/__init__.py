"""Attention inside segments, by named backends: whole cells, and tails, whose keys lie in pages.

| backend | where | cells | tails |
|---|---|---|---|
| `flash_attn` | CUDA, 16-bit types | one call over cells of any lengths | the same, on the pages |
| `sdpa` | everywhere | torch's scaled dot product | keys gathered from pages, masked |
| `vllm_cpu` | CPUs, head sizes of vLLM's kernel | vLLM's paged kernel, on scratch pages | the same, on the pages |
| `xformers` | CUDA, with xformers installed | one call over cells of any lengths | as `sdpa` |

Layers that see a part of their segment only have a backend of their own, of the same name (`layers.py`); `xformers` is
not taken for such models.
"""

from vllm_armt.attention.base import Attention, AttentionShape
from vllm_armt.attention.choose import choose_attention
from vllm_armt.attention.layers import LayerAttention

__all__ = ["Attention", "AttentionShape", "LayerAttention", "choose_attention"]
