"""The Llama family as grouped decoder layers: Llama, Mistral, Qwen2 (biases) and Qwen3 (q/k norms)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_armt.diagonal.stacked import Part, StackedLinear
from vllm_armt.models.weights import Slot

NORMS = ("input_layernorm", "post_attention_layernorm")


class LlamaLayers(nn.Module):
    """L Llama decoder layers with stacked weights; a `GroupedLayers` (HF `LlamaDecoderLayer`).

    Args:
        config: the base model's configuration.
        segment_rows: S + m, the positions that occur.
        dtype: of weights and activations.

    Raises:
        ValueError: the configuration asks for something that is not supported.
    """

    def __init__(self, config: PretrainedConfig, segment_rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"`hidden_act` of the base model is {config.hidden_act!r}; only 'silu' is supported.")
        L, d = config.num_hidden_layers, config.hidden_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_layers, self.eps = L, config.rms_norm_eps
        self.head_dim = getattr(config, "head_dim", None) or d // heads
        tp = get_tensor_model_parallel_world_size()
        if heads % tp or config.intermediate_size % tp or (kv_heads % tp and tp % kv_heads):
            raise ValueError(
                f"{heads} attention heads, {kv_heads} key-value heads and {config.intermediate_size} MLP features "
                f"can't be split over tensor_parallel_size={tp}."
            )
        self.kv_heads = max(1, kv_heads // tp)
        qkv_bias = getattr(config, "attention_bias", config.model_type == "qwen2")
        o_bias = getattr(config, "attention_bias", False)
        mlp_bias = getattr(config, "mlp_bias", False)
        kv = Part(kv_heads * self.head_dim, min(tp, kv_heads))
        self.qkv_proj = StackedLinear(
            L, d, {"q_proj": Part(heads * self.head_dim, tp), "k_proj": kv, "v_proj": kv}, qkv_bias, dtype
        )
        self.o_proj = StackedLinear(L, heads * self.head_dim, {"o_proj": Part(d)}, o_bias, dtype, shard="input")
        mlp = Part(config.intermediate_size, tp)
        self.gate_up_proj = StackedLinear(L, d, {"gate_proj": mlp, "up_proj": mlp}, mlp_bias, dtype)
        self.down_proj = StackedLinear(
            L, config.intermediate_size, {"down_proj": Part(d)}, mlp_bias, dtype, shard="input"
        )
        self.norms = nn.ParameterDict({name: _ones(L, d, dtype) for name in NORMS})
        if config.model_type == "qwen3":
            self.norms.update({name: _ones(L, self.head_dim, dtype) for name in ("q_norm", "k_norm")})
        self.act = SiluAndMul()
        self.rotary = get_rope(
            self.head_dim,
            max_position=max(config.max_position_embeddings, segment_rows),
            rope_parameters=config.rope_parameters,
            dtype=dtype,
        )

    def slots(self) -> dict[str, Slot]:
        """Where a decoder layer's tensors go, by their names in the checkpoint."""
        slots: dict[str, Slot] = {}
        for prefix, linear in (
            ("self_attn", self.qkv_proj),
            ("self_attn", self.o_proj),
            ("mlp", self.gate_up_proj),
            ("mlp", self.down_proj),
        ):
            slots |= Slot.of_linear(prefix, linear)
        for name, weight in self.norms.items():
            prefix = "self_attn." if name in ("q_norm", "k_norm") else ""
            slots[f"{prefix}{name}.weight"] = Slot.of_vector(weight)
        return slots

    def project(self, layers: slice, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm("input_layernorm", layers, h)
        q, k, v = self.qkv_proj(x, layers).flatten(0, 1).split(self.qkv_proj.local_sizes, dim=-1)
        if "q_norm" in self.norms:
            q, k = (self._head_norm(name, layers, t) for name, t in (("q_norm", q), ("k_norm", k)))
        q, k = self.rotary(positions, q, k)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # type: ignore[return-value]

    def complete(self, layers: slice, h: Tensor, o: Tensor) -> Tensor:
        h = h + self.o_proj(o, layers)
        x = self.gate_up_proj(self._norm("post_attention_layernorm", layers, h), layers)
        return h + self.down_proj(self.act(x), layers)

    def _norm(self, name: str, layers: slice, h: Tensor) -> Tensor:
        return F.rms_norm(h, h.shape[-1:], eps=self.eps) * self.norms[name][layers].unsqueeze(1)

    def _head_norm(self, name: str, layers: slice, x: Tensor) -> Tensor:
        """RMS norm of every head: `[n * rows, heads * head_dim]`, the weight being shared by a layer's heads."""
        weight = self.norms[name][layers]
        heads = x.reshape(weight.shape[0], -1, self.head_dim)
        return (F.rms_norm(heads, heads.shape[-1:], eps=self.eps) * weight.unsqueeze(1)).view(x.shape)


def _ones(layers: int, size: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(layers, size, dtype=dtype), requires_grad=False)
