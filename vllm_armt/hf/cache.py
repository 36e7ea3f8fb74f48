"""What is kept of a text between two calls: what flows from segment to segment, and the open segment's KV."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache


@dataclass
class RecurrentCache:
    """State of a batch of texts of equal length; constant in size but for the open segment's KV.

    It travels as `past_key_values`. The model replaces its tensors and never changes them in place, so
    that gradients flow through them. Of the first four, a system uses what flows in it.

    Attributes:
        batch_size: B, texts side by side.
        M: by layer the associative memory, float32 `[B, h, K/h, d/h]`; layers without memory are absent.
        z: by layer its normaliser, float32 `[B, h, K/h]`.
        memory: by layer the memory rows `[B, m, d]` that the next segment finds; an RMT has those of its
            top layer only, after the final norm.
        window: keys and values of the closed segment before the open one, its tokens only.
        segments: segments closed so far.
        tokens: tokens seen so far, those of the open segment included.
        open_tokens: tokens of the open segment.
        kv: what the open segment's next tokens attend to: the window, then the segment's own keys and
            values. None if it has none yet.
    """

    batch_size: int
    M: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[int, Tensor] = field(default_factory=dict)
    window: DynamicCache | None = None
    segments: int = 0
    tokens: int = 0
    open_tokens: int = 0
    kv: DynamicCache | None = None

    # asked for by transformers' generation loop
    is_compileable = False
    is_croppable = False

    @property
    def window_size(self) -> int:
        """Keys of the window; 0 without one."""
        return 0 if self.window is None else self.window.get_seq_length()

    def end_segment(self, window_begin: int | None = None) -> None:
        """Count the open segment as closed and drop its KV.

        Args:
            window_begin: keep the keys and values of its tokens, of which the first is this row of the segment.
        """
        if window_begin is not None:
            assert self.kv is not None
            begin = self.window_size + window_begin
            kept = slice(begin, begin + self.open_tokens)
            self.window = DynamicCache((x.keys[:, :, kept], x.values[:, :, kept]) for x in self.kv.layers)
        self.segments += 1
        self.open_tokens, self.kv = 0, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far; transformers' generation loop cuts a prompt by it."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` of the batch, as beam search asks."""
        for state in (self.M, self.z, self.memory):
            state.update({layer: tensor.index_select(0, beam_idx) for layer, tensor in state.items()})
        for keys in (self.window, self.kv):
            if keys is not None:
                keys.reorder_cache(beam_idx)
