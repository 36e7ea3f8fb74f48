"""The readable truth of the executors: one document at a time, segment after segment, layer after layer.

Plain torch after the papers' definitions. With what it is the truth of it shares the decoder layers and the final
norm alone, which tests of their own compare with transformers'.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vllm_armt.attention.naive import attend, causal
from vllm_armt.config import ARMTConfig, PRMTConfig, RecurrentConfig, RMTConfig
from vllm_armt.core import MemoryRule, Piece, Segmentation
from vllm_armt.executor.parts import ModelParts
from vllm_armt.linear.rows import Rows

EPS = 1e-5

State = list[dict[str, Tensor]]
"""Per layer, what a segment leaves, by name: M `[h, K/h, d/h]` and z `[h, K/h]`, or memory `[m, d]`."""


class NaiveModel(Protocol):
    """What is computed.

    Attributes:
        config: of the model.
        parts: of which only the decoder layers, the positions and an RMT's final norm are used.
        memory: the checkpoint's tensors of the recurrence. Of an ARMT "around", the rows around the tokens
            `[prefix + m, d]`, and by name, stacked over layers, W_mq, W_mk, W_mv, W_mb and the bias b of beta; of a
            PRMT and an RMT "initial", `[L, m, d]` and `[m, d]`.
    """

    @property
    def config(self) -> RecurrentConfig: ...

    @property
    def parts(self) -> ModelParts: ...

    @property
    def memory(self) -> dict[str, Tensor]: ...


def recompute(model: NaiveModel, document: Tensor, segmentation: Segmentation) -> tuple[Tensor, list[State]]:
    """The last layer's outputs of a document's embeddings `[T, d]`, and what each closed segment leaves."""
    outputs: list[Tensor] = []
    states: list[State] = []
    keys: list[tuple[Tensor, Tensor]] = []
    reaches = model.config.reaches
    begin, prefix = 0, model.config.segment_layout.prefix
    for piece in segmentation.split(0, len(document)):
        before, before_keys = (states[-1], keys) if states else (None, [])
        first_rows, last_rows = _around(model, before)
        tokens = document[begin : begin + piece.n]
        h = torch.cat([first_rows, tokens, last_rows] if piece.closes else [first_rows, tokens])
        positions = _positions(model, piece)
        if model.parts.positions is not None:
            h = h + model.parts.positions(positions)
        state, keys = [], []
        for layer in range(model.parts.layers.num_layers):
            rows = Rows(layer, (len(h),))
            h = _enter(model, layer, before, h, piece.closes).clone()
            q, k, v = model.parts.layers.project(h, rows, positions)
            own = slice(prefix, prefix + piece.n)
            keys.append((k[own].clone(), v[own].clone()))
            full = model.config.num_mem_tokens if piece.closes and model.config.segment_layout.full_suffix else 0
            seen = causal(len(h), full=full, reach=reaches[layer])
            if model.config.window and before_keys:
                past_k, past_v = before_keys[layer]
                if model.config.window_shift:
                    assert model.parts.move is not None
                    past_k = model.parts.move(past_k)
                k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
                seen = torch.cat([_sees(model, piece, len(past_k)), seen], dim=1)
            model.parts.layers.complete(h, attend(q, k, v, seen).to(h.dtype), rows)
            if piece.closes:
                state.append(_leave(model, layer, before, h))
        if piece.closes:
            states.append(state)
        outputs.append(h[own])
        begin += piece.n
    return torch.cat(outputs), states


def _around(model: NaiveModel, before: State | None) -> tuple[Tensor, Tensor]:
    """The rows before and behind the tokens of a segment, as embeddings."""
    m = model.config.num_mem_tokens
    if isinstance(model.config, ARMTConfig):
        around = model.memory["around"]
        return around[:-m], around[-m:]
    if isinstance(model.config, PRMTConfig):
        # every layer overwrites them
        nothing = torch.zeros_like(model.memory["initial"][0])
        return nothing, nothing
    memory = model.memory["initial"] if before is None else before[-1]["memory"]
    return memory, memory


def _positions(model: NaiveModel, piece: Piece) -> Tensor:
    m = model.config.num_mem_tokens
    layout = model.config.segment_layout
    tokens_end = layout.prefix + piece.n
    suffix = tokens_end if layout.suffix_position is None else layout.suffix_position
    own = [*range(tokens_end), *(range(suffix, suffix + m) if piece.closes else ())]
    return torch.tensor(own) + piece.segment * layout.stride


def _sees(model: NaiveModel, piece: Piece, past: int) -> Tensor:
    """Which of the tokens before the rows of a segment see: bool `[rows, past]`."""
    m = model.config.num_mem_tokens
    prefix, suffix = model.config.segment_layout.prefix, m if piece.closes else 0
    if model.config.window == "all":
        return torch.ones(prefix + piece.n + suffix, past, dtype=torch.bool)
    if model.config.window == "rows":
        seen = torch.ones(prefix + piece.n + suffix, past, dtype=torch.bool).triu()
        seen[:prefix] = False
        return seen
    blind, all_of_them = torch.zeros(prefix, past), torch.ones(suffix, past)
    return torch.cat([blind, torch.ones(piece.n, past).triu(), all_of_them]).bool()


def _enter(model: NaiveModel, layer: int, before: State | None, h: Tensor, closes: bool) -> Tensor:
    """A layer's inputs with what the segment before has left."""
    m = model.config.num_mem_tokens
    if isinstance(model.config, ARMTConfig) and before is not None and model.config.has_memory[layer]:
        return h + _read(model, layer, before[layer], h)
    if isinstance(model.config, PRMTConfig):
        memory = _given(model, before, layer)
        return torch.cat([memory, h[m:-m], memory] if closes else [memory, h[m:]])
    return h


def _leave(model: NaiveModel, layer: int, before: State | None, h: Tensor) -> dict[str, Tensor]:
    """What the next segment gets, from a layer's outputs."""
    m = model.config.num_mem_tokens
    config, top = model.config, model.parts.layers.num_layers - 1
    if isinstance(config, ARMTConfig):
        return _write(model, layer, before, h[-m:])
    if isinstance(config, PRMTConfig):
        # in the released code the layer above writes into the same tensor
        is_overwritten = config.aliased and layer < top
        return {"memory": _given(model, before, layer + 1) if is_overwritten else h[-m:]}
    assert isinstance(config, RMTConfig)
    return {"memory": model.parts.recurrence.norm(h[-m:])} if layer == top else {}  # type: ignore[attr-defined]


def _given(model: NaiveModel, before: State | None, layer: int) -> Tensor:
    """The memory `[m, d]` that a layer of a PRMT takes in."""
    return model.memory["initial"][layer] if before is None else before[layer]["memory"]


def _read(model: NaiveModel, layer: int, state: dict[str, Tensor], h: Tensor) -> Tensor:
    assert isinstance(model.config, ARMTConfig)
    rule = model.config.memory_rule
    found = []
    for u, M, z in zip(_heads(rule, h @ model.memory["W_mq"][layer].T), state["M"], state["z"], strict=True):
        q = _phi(rule, u)
        found.append(q @ M / (q @ z + EPS).unsqueeze(1) if rule.use_denom else q @ M)
    return torch.cat(found, dim=1)


def _write(model: NaiveModel, layer: int, before: State | None, o: Tensor) -> dict[str, Tensor]:
    m = model.config.num_mem_tokens
    config = model.config
    assert isinstance(config, ARMTConfig)
    rule, h, K, d = config.memory_rule, config.n_heads, config.feature_size, model.config.base_model_config.hidden_size
    old = {"M": o.new_zeros(h, K // h, d // h), "z": o.new_zeros(h, K // h)} if before is None else before[layer]
    if not config.has_memory[layer]:
        return old
    keys, values = o @ model.memory["W_mk"][layer].T, o @ model.memory["W_mv"][layer].T
    betas = torch.sigmoid(o @ model.memory["W_mb"][layer].T + model.memory["b"][layer])
    parts = (_heads(rule, x) for x in (keys, values, betas))
    new_M, new_z = [], []
    for u, v, beta, M, z in zip(*parts, old["M"], old["z"], strict=True):
        k = _phi(rule, u)
        found, gamma = k @ M, torch.ones(m, 1)
        if rule.use_denom and before is not None:
            den = (k @ z + EPS).unsqueeze(1)
            found = found / den
            if rule.correction:
                norm2 = k.square().sum(1, keepdim=True) + (0 if rule.normalize else EPS)
                gamma = (1 - den / norm2).clamp(0, 1)
        new_M.append(M + k.T @ (beta * (v - found)))
        new_z.append(z + (gamma * k).sum(0) if rule.use_denom else z)
    return {"M": torch.stack(new_M), "z": torch.stack(new_z)}


def _heads(rule: MemoryRule, x: Tensor) -> tuple[Tensor, ...]:
    """`[rows, c]` cut into h parts of neighbouring channels."""
    return x.chunk(rule.heads, dim=1)


def _phi(rule: MemoryRule, u: Tensor) -> Tensor:
    """`[rows, p] -> [rows, 6p]`."""
    x = torch.cat([u.relu(), (-u).relu()], dim=1)
    features = torch.cat([x * x.roll(j, dims=1) for j in (1, 2, 3)], dim=1)
    return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12) if rule.normalize else features
