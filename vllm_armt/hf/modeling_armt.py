"""ARMT: an associative memory in every layer (ARMT paper, arXiv 2407.04841, section 3).

With a sliding window attention also reaches one window back, into the segment before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, dtype, nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask

from vllm_armt.config import ARMTConfig, ARMTSWConfig
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.diagonal import Sweep, cannot_group, refuse_unlike, sweeping
from vllm_armt.hf.modeling_recurrent import HiddenStates, RecurrentForCausalLM, RecurrentLayer, check_positions, rows_of


class ARMTLayer(RecurrentLayer):
    """A base model's decoder layer that reads its memory before it runs and writes it afterwards.

    A layer that `config.wrap_layers` leaves out has no memory and only runs.
    """

    sweep: Sweep | None = None
    """Set while the model runs all cells in diagonal order."""

    def __init__(self, layer: nn.Module, layer_idx: int, config: ARMTConfig, memory_dtype: dtype):
        super().__init__(layer, layer_idx)
        self.rule = config.memory_rule
        self.has_memory = config.has_memory[layer_idx]
        if self.has_memory:
            d, p = config.base_model_config.hidden_size, config.d_mem
            self.W_mq = nn.Linear(d, p, bias=False, dtype=memory_dtype)
            self.W_mk = nn.Linear(d, p, bias=False, dtype=memory_dtype)
            self.W_mv = nn.Linear(d, d, bias=False, dtype=memory_dtype)
            self.W_mb = nn.Linear(d, config.beta_size, dtype=memory_dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run one cell, or hand out what a sweep over all cells has made of this layer's.

        Args:
            hidden_states: `[B, rows, d]`, the rows of `call`.
            args, kwargs: what the base model hands to its layers.

        Returns:
            What the base model's layer does.
        """
        if self.sweep is not None:
            return self.sweep.output(self.layer_idx, hidden_states, *args, **kwargs)
        if not self.has_memory:
            return self.layer(hidden_states, *args, **kwargs)
        cache, i, m = self.call.cache, self.layer_idx, self.call.suffix
        if cache.segments > 0:
            hidden_states = self.read(hidden_states, cache.M[i], cache.z[i])
        output = self.layer(hidden_states, *args, **kwargs)
        if m > 0:
            memory_tokens = rows_of(output)[:, -m:]
            cache.M[i], cache.z[i] = self.write(memory_tokens, cache.M[i], cache.z[i], first=cache.segments == 0)
        return output

    def read(self, hidden_states: Tensor, M: Tensor, z: Tensor) -> Tensor:
        """Rows `[B, rows, d]` and what each finds in a memory (shapes as in `RecurrentCache`)."""
        q = self.rule.phi(self.W_mq(hidden_states.to(self.W_mq.weight.dtype)).to(M.dtype))
        read = self.rule.read(self.rule.split_heads(q), M, z)
        return hidden_states + self.rule.merge_heads(read).to(hidden_states.dtype)

    def write(self, memory_tokens: Tensor, M: Tensor, z: Tensor, first: Tensor | bool) -> tuple[Tensor, Tensor]:
        """M and z after a segment, the text's `first` or not, whose memory tokens left the layer as `[B, m, d]`."""
        o = memory_tokens.to(self.W_mk.weight.dtype)
        k, v, beta = (
            self.rule.split_heads(x)
            for x in (
                self.rule.phi(self.W_mk(o).to(M.dtype)),
                self.W_mv(o).to(M.dtype),
                self.W_mb(o).to(M.dtype).sigmoid(),
            )
        )
        residual, dz = self.rule.update(k, v, beta, k @ M, z, first)
        return M + k.mT @ residual, z + dz

    def reset_memory(self) -> None:
        """Draw the projections as the authors do; with W_mv = 0 nothing is ever written to M."""
        if self.has_memory:
            for linear in (self.W_mq, self.W_mk, self.W_mb):
                init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            init.zeros_(self.W_mb.bias)
            init.zeros_(self.W_mv.weight)


class ARMTForCausalLM(RecurrentForCausalLM):
    """An associative recurrent memory transformer with a language-model head.

    `memory` `[m, d]` are the embeddings of the memory tokens, which end every segment; around each decoder
    layer stands an `ARMTLayer`. A fresh one computes what the base model does within the first segment,
    and in every segment until W_mv is trained: W_mv is zero. `sink` `[1, d]`, where the configuration has one, is
    the embedding of a row that begins every segment.
    """

    config_class = ARMTConfig
    _no_split_modules = ["ARMTLayer"]  # noqa: RUF012

    def reset_memory(self) -> None:
        super().reset_memory()
        if self.config.use_sink:
            init.normal_(self.sink, std=0.02)
        for layer in self._armt_layers:
            layer.reset_memory()

    def _add_memory(self, dtype: torch.dtype) -> None:
        self.memory = self._memory_tokens(dtype)
        if self.config.use_sink:
            self.sink = nn.Parameter(torch.empty(1, self.config.base_model_config.hidden_size, dtype=dtype))
        for i, layer in enumerate(self._layers):
            self._layers[i] = ARMTLayer(layer, i, self.config, memory_dtype=dtype)

    def _initial_state(self, batch_size: int) -> RecurrentCache:
        dtype = torch.promote_types(self.memory.dtype, torch.float32)
        M, z = (self.memory.new_zeros(batch_size, *self.config.state[name], dtype=dtype) for name in ("M", "z"))
        layers = [i for i, has_memory in enumerate(self.config.has_memory) if has_memory]
        return RecurrentCache(batch_size, M=dict.fromkeys(layers, M), z=dict.fromkeys(layers, z))

    def _prefix_and_suffix(self, cache: RecurrentCache) -> tuple[Tensor, Tensor]:
        return self.sink if self.config.use_sink else self.memory[:0], self.memory

    def _mask(self, rows: Tensor, cache: RecurrentCache, n: int) -> Tensor:
        config, window, tokens = self.config, cache.window_size, cache.open_tokens + n
        slides = window > 0 and config.window != "all"
        if not (slides or config.full_suffix):
            return super()._mask(rows, cache, n)
        # rows and keys are counted over the window and the segment
        first = window + config.prefix_rows
        last = first + tokens

        def sees_suffix(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return (row >= last) & (key >= last)

        def sees_window(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            if config.window == "rows":
                return (key >= window) | ((row >= first) & (key >= row - window))
            return (key >= window) | ((row >= first) & (key >= row - first)) | (row >= last)

        return create_causal_mask(
            self.model.config,
            rows,
            attention_mask=None,
            past_key_values=cache.kv,
            or_mask_function=sees_suffix if config.full_suffix else None,
            and_mask_function=sees_window if slides else None,
        )

    def _run_diagonally(self, embeds: Tensor, state: RecurrentCache, every_layer: bool) -> HiddenStates:
        layers = self._armt_layers
        self._refuse_ungroupable()
        refuse_unlike(layers)
        (B, T, _), S, m = embeds.shape, self.config.segment_size, self.config.num_mem_tokens
        first = self.config.prefix_rows
        if T <= S:
            # nothing to group, and the memory is to get no gradient here, which an optimizer tells from one of zeros
            return self._run_segment(embeds, state, close=False, every_layer=every_layer)
        N = -(-T // S)
        # what stands behind a text's last token is seen by no token, and its memory is found by no segment
        tokens = F.pad(embeds, (0, 0, 0, N * S - T)).unflatten(1, (N, S)).transpose(0, 1)
        prefix, suffix = (part.to(embeds.dtype).expand(N, B, -1, -1) for part in self._prefix_and_suffix(state))
        rows = torch.cat([prefix, tokens, suffix], dim=2).flatten(0, 1)
        positions = torch.tensor(self._positions(T), device=rows.device).repeat_interleave(B, dim=0)
        with sweeping(layers, state, m):
            hidden = self._run_base(rows, positions, self._mask(rows, state, S), every_layer=every_layer)
        of_tokens = (x[:, first : first + S].unflatten(0, (N, B)) for x in hidden)
        return tuple(x.transpose(0, 1).flatten(1, 2)[:, :T] for x in of_tokens)

    def _positions(self, T: int) -> list[list[int]]:
        """Positions of every segment's rows, `[N][prefix + S + m]`."""
        S, layout = self.config.segment_size, self.config.segment_layout
        *closed, open_ = self.config.segmentation(T).split(0, T)
        of_open = layout.positions(open_.segment, 0, open_.n, closes=False)
        check_positions(of_open, self.config)
        # no token sees the rows behind it, whose own positions may lie beyond the learned ones
        unseen = [0] * (layout.rows - len(of_open))
        return [*(layout.positions(piece.segment, 0, S, closes=True) for piece in closed), of_open + unseen]

    def _refuse_ungroupable(self) -> None:
        config, attention = self.config, self.model.config._attn_implementation
        reasons = {
            "a segment attends to the keys of the one before, which are not kept in that order": (
                config.window is not None
            ),
            f"some of its layers see a part of their segment only ({config.base_model_config.model_type} has local "
            "layers): all must be alike": len(set(config.reaches)) > 1,
            "`wrap_layers` leaves layers without memory: all must be alike": not all(config.has_memory),
            f"`segment_alignment` is {config.segment_alignment!r}: only 'left' makes segments of equal length": (
                config.segment_alignment != "left"
            ),
            "gradient checkpointing is on, which cannot be grouped": self.training and self.is_gradient_checkpointing,
            f"attn_implementation is {attention!r}: only 'sdpa' and 'eager' can be grouped": (
                attention not in ("sdpa", "eager")
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise cannot_group(reason)

    @property
    def _armt_layers(self) -> list[ARMTLayer]:
        return [layer for layer in self._layers if isinstance(layer, ARMTLayer)]


class ARMTSlidingWindowForCausalLM(ARMTForCausalLM):
    """An ARMT whose rows also attend to keys of the tokens of the segment before.

    Which of them a row sees, and at which distance they lie, says `config.window_edge` and `config.window_positions`.
    """

    config_class = ARMTSWConfig
