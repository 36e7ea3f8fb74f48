"""What is kept of a text between two calls: the memory after its closed segments and the open segment's KV."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_armt.config import ARMTConfig


@dataclass
class ARMTCache:
    """State of a batch of texts of equal length; constant in size but for the open segment's KV.

    It travels as `past_key_values`. The model replaces M and z and never changes them in place, so that
    gradients flow through them.

    Attributes:
        batch_size: B, texts side by side.
        M: by layer the associative memory, float32 `[B, K, d]`; layers without memory are absent.
        z: by layer its normaliser, float32 `[B, K]`.
        segments: segments written to M and z so far.
        tokens: tokens seen so far, those of the open segment included.
        open_tokens: tokens of the open segment.
        kv: keys and values of the open segment; None if it has none yet.
    """

    batch_size: int
    M: dict[int, Tensor]
    z: dict[int, Tensor]
    segments: int = 0
    tokens: int = 0
    open_tokens: int = 0
    kv: DynamicCache | None = None

    # asked for by transformers' generation loop
    is_compileable = False
    is_croppable = False

    @classmethod
    def empty(cls, config: ARMTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> ARMTCache:
        """The state before the first token: M = 0 and z = 0."""
        layers = [i for i, has_memory in enumerate(config.has_memory) if has_memory]
        M = torch.zeros(
            batch_size, config.feature_size, config.base_model_config.hidden_size, device=device, dtype=dtype
        )
        return cls(batch_size, dict.fromkeys(layers, M), dict.fromkeys(layers, M[..., 0]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far; transformers' generation loop cuts a prompt by it."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` of the batch, as beam search asks."""
        self.M = {layer: M.index_select(0, beam_idx) for layer, M in self.M.items()}
        self.z = {layer: z.index_select(0, beam_idx) for layer, z in self.z.items()}
        if self.kv is not None:
            self.kv.reorder_cache(beam_idx)
