"""The Llama family as grouped decoder layers: Llama, Mistral, Qwen2 (biases) and Qwen3 (q/k norms)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_armt.diagonal.norm import StackedRMSNorm
from vllm_armt.diagonal.rows import Rows
from vllm_armt.diagonal.stacked import Part, StackedLinear
from vllm_armt.models.weights import Slot


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
        self.num_layers = L
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
        self.input_layernorm, self.post_attention_layernorm = (
            StackedRMSNorm(L, d, config.rms_norm_eps, dtype) for _ in range(2)
        )
        self.q_norm, self.k_norm = (
            StackedRMSNorm(L, self.head_dim, config.rms_norm_eps, dtype) if config.model_type == "qwen3" else None
            for _ in range(2)
        )
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
        norms = {
            "input_layernorm": self.input_layernorm,
            "post_attention_layernorm": self.post_attention_layernorm,
            "self_attn.q_norm": self.q_norm,
            "self_attn.k_norm": self.k_norm,
        }
        slots |= {f"{name}.weight": Slot.of_vector(norm.weight) for name, norm in norms.items() if norm is not None}
        return slots

    def project(self, h: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(self.input_layernorm(h, rows), rows)
        q, k, v = qkv.split(self.qkv_proj.local_sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm_heads(self.q_norm, q, rows), self._norm_heads(self.k_norm, k, rows)
        q, k = self.rotary(positions, q, k)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # type: ignore[return-value]

    def complete(self, h: Tensor, o: Tensor, rows: Rows) -> None:
        x = self.post_attention_layernorm.add(self.o_proj(o, rows), h, rows)
        h += self.down_proj(self._act(self.gate_up_proj(x, rows)), rows)

    def _act(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. On CPUs vLLM's kernel takes five times as long as torch's two."""
        if gate_up.device.type != "cpu":
            return self.act(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _norm_heads(self, norm: StackedRMSNorm, x: Tensor, rows: Rows) -> Tensor:
        """RMS norm of every head of `[R, heads * head_dim]`, the weight being shared by a layer's heads."""
        heads = x.shape[-1] // self.head_dim
        per_head = Rows(rows.first_layer, tuple(count * heads for count in rows.counts))
        return norm(x.reshape(-1, self.head_dim), per_head).view(x.shape)
