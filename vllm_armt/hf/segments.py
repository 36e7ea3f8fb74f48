"""SegmentwiseModel: a base model of transformers that runs segment by segment.

A text is cut into segments of S tokens. Each segment is one call of the base model on the rows
`[prefix | tokens | suffix]`: attention, positions and KV begin anew, and only what the system lets
flow from segment to segment goes on.

A segment is written when the next token arrives, not when its S-th token does. No logits depend on
the difference, the last segment of a text costs no memory tokens, and the two generation policies
become one question: may the open segment close?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from vllm_armt.config import RecurrentConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.layer import Call, RecurrentLayer
from vllm_armt.hf.positions import check_positions, widen_positions


def is_memory(name: str) -> bool:
    """Whether a parameter of this name is a system's own, and not the base model's."""
    return name.endswith(("memory", "sink")) or ".W_m" in name


class SegmentwiseModel(PreTrainedModel):
    """The base model `model`, what a system adds to it, and how both run; each system states what differs.

    Args:
        config: of the whole model.
        base: a base model to build around, which is changed in place; None for a fresh one.
    """

    def __init__(self, config: RecurrentConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = base or AutoModelForCausalLM.from_config(config.base_model_config)
        if config.extra_positions:
            widen_positions(self.model, config)
        self._add_memory(getattr(torch, config.memory_dtype) if config.memory_dtype else self.model.dtype)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    def close_segment(self, cache: RecurrentCache) -> None:
        """Write the open segment to memory: its memory tokens run on top of its KV, which is dropped.

        The next token opens a new segment, even if this one was not full.

        Raises:
            ValueError: no segment is open.
        """
        if cache.open_tokens == 0:
            raise ValueError("No segment is open: there is nothing to write to memory.")
        embeddings = self.get_input_embeddings().weight
        self._run_segment(embeddings.new_empty(cache.batch_size, 0, embeddings.shape[1]), cache, close=True)

    # what a system states of itself

    def _add_memory(self, dtype: torch.dtype) -> None:
        """Add the system's parameters in this dtype, and wrap the decoder layers if it has any there."""
        raise NotImplementedError

    def _initial_state(self, batch_size: int) -> RecurrentCache:
        """The state before the first token."""
        raise NotImplementedError

    def _prefix_and_suffix(self, cache: RecurrentCache) -> tuple[Tensor, Tensor]:
        """Embeddings of a whole prefix and suffix, `[rows, d]` or `[B, rows, d]`."""
        raise NotImplementedError

    def _finish(self, suffix: Tensor, cache: RecurrentCache) -> None:
        """Keep what flows on of a closed segment's final hidden states `[B, m, d]`."""

    def _run_diagonally(self, embeds: Tensor, state: RecurrentCache) -> Tensor:
        """Final hidden states `[B, T, d]` of whole texts, from their embeddings and the state before them."""
        raise ValueError(
            f"schedule is 'diagonal', which is for model_type 'armt' alone; this is {self.config.model_type!r}. Use "
            "schedule='sequential'."
        )

    def _mask(self, rows: Tensor, cache: RecurrentCache, n: int) -> Tensor:
        """What `rows` `[B, rows, d]`, n of them tokens, attend to: everything before them."""
        before = 0 if cache.kv is None else cache.kv.get_seq_length()
        # given although it is all ones: without it transformers takes positions that jump for packed texts
        return rows.new_ones(rows.shape[0], before + rows.shape[1], dtype=torch.bool)

    # how its segments run

    @property
    def _layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.config.backbone.layers)

    def _memories(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name.endswith("memory")]

    def _memory_tokens(self, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(
            torch.empty(self.config.num_mem_tokens, self.config.base_model_config.hidden_size, dtype=dtype)
        )

    def _wrapped_layers(self) -> list[RecurrentLayer]:
        return [layer for layer in self._layers if isinstance(layer, RecurrentLayer)]

    def _run_sequentially(self, embeds: Tensor, cache: RecurrentCache, stay_open: bool, keep_kv: bool) -> Tensor:
        """Final hidden states of tokens, both `[B, T, d]`, segment by segment."""
        *closed, last = self._split(embeds, cache, stay_open)
        hidden = [self._run_segment(tokens, cache, close=True) for tokens in closed]
        hidden.append(self._run_segment(last, cache, close=False, keep_kv=keep_kv))
        return torch.cat(hidden, dim=1)

    def _split(self, embeds: Tensor, cache: RecurrentCache, stay_open: bool) -> tuple[Tensor, ...]:
        """Cut `[B, T, d]` where segments end; all pieces but the last end theirs."""
        T = embeds.shape[1]
        if stay_open or (cache.open_tokens and self.config.needs_prompt_length):
            return (embeds,)
        if cache.open_tokens >= self.config.segment_size:
            self.close_segment(cache)
        pieces = self.config.segmentation(T).split(cache.open_tokens, cache.open_tokens + T)
        return embeds.split([piece.n for piece in pieces], dim=1)

    def _run_segment(self, tokens: Tensor, cache: RecurrentCache, *, close: bool, keep_kv: bool = False) -> Tensor:
        """Run the next tokens of the open segment, its prefix before and its suffix behind them where due.

        Args:
            tokens: embeddings `[B, n, d]`.
            cache: the text so far.
            close: end the segment and write its memory.
            keep_kv: keep the keys and values of a segment that stays open.

        Returns:
            Final hidden states of the tokens, `[B, n, d]`.
        """
        B, n, _ = tokens.shape
        config, layout = self.config, self.config.segment_layout
        call = Call(cache, layout.prefix if cache.open_tokens == 0 else 0, layout.suffix if close else 0)
        prefix, suffix = (part.to(tokens.dtype).expand(B, -1, -1) for part in self._prefix_and_suffix(cache))
        rows = torch.cat([prefix[:, : call.prefix], tokens, suffix[:, : call.suffix]], dim=1)
        positions = layout.positions(cache.segments, cache.open_tokens, n, close)
        check_positions(positions[: call.prefix + n] if config.wrap_pos else positions, config)
        if cache.kv is None:
            cache.kv = self._open_kv(cache, keep_kv)
        with self._calling(call):
            position_ids = torch.tensor(positions, device=rows.device)[None]
            hidden = self._run_base(rows, position_ids, self._mask(rows, cache, n), cache.kv)
        cache.tokens += n
        cache.open_tokens += n
        if close:
            self._finish(hidden[:, call.prefix + n :], cache)
            cache.end_segment(window_begin=layout.prefix if config.window else None)
        return hidden[:, call.prefix : call.prefix + n]

    def _run_base(self, rows: Tensor, positions: Tensor, mask: Tensor, kv: DynamicCache | None = None) -> Tensor:
        """Final hidden states of `rows` `[B, rows, d]`, at positions `[1 or B, rows]`."""
        output = self.model.base_model(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=kv,
            use_cache=kv is not None,
        )
        return output.last_hidden_state

    def _open_kv(self, cache: RecurrentCache, keep: bool) -> DynamicCache | None:
        """Where a segment that begins puts its keys; None if nobody will ask for them."""
        if cache.window is not None:
            return DynamicCache((layer.keys, layer.values) for layer in cache.window.layers)
        if self.config.window:
            return DynamicCache()
        return DynamicCache(config=self.config.base_model_config) if keep else None

    @contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        layers = self._wrapped_layers()
        for layer in layers:
            layer.call = call
        try:
            yield
        finally:
            for layer in layers:
                del layer.call
