"""Models that are measured: base models by name or from a checkpoint, their sizes, and their useful operations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vllm_armt.config import RecurrentConfig
    from vllm_armt.core.pages import PageLayout

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "12x512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
    "llama-160m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Fields of a `LlamaConfig` by name; the vocabulary has 32,000 tokens unless one says otherwise."""

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Model:
    """A recurrent-memory transformer, an ARMT but for benchmarks of what all have, and the base model inside it.

    Attributes:
        name: what tables call it.
        config: with the base model's own configuration in `base_model_config`.
        dtype: of weights and activations, a torch dtype's name.
        directory: a checkpoint; None for random weights.
    """

    name: str
    config: RecurrentConfig
    dtype: str
    directory: Path | None = None

    @property
    def base(self) -> PretrainedConfig:
        """The base model's configuration."""
        return self.config.base_model_config

    @property
    def segment_size(self) -> int:
        """S."""
        return self.config.segment_size

    @property
    def case(self) -> dict[str, Any]:
        """What tells this model from others in one table."""
        return {
            "shape": self.name,
            "dtype": self.dtype,
            "segment_size": self.segment_size,
            "num_mem_tokens": self.config.num_mem_tokens,
            "d_mem": self.d_mem,
        }

    @property
    def d_mem(self) -> int | None:
        """p of an ARMT; None for systems whose memory is rows of the hidden size."""
        return getattr(self.config, "d_mem", None)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return getattr(self.base, "head_dim", None) or self.base.hidden_size // self.base.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; configurations that do not say have as many as of queries."""
        return getattr(self.base, "num_key_value_heads", None) or self.base.num_attention_heads

    @cached_property
    def layer_weights(self) -> int:
        """Entries of the matrices of one decoder layer of the base model, each of which every row is multiplied with.

        Counted in transformers' own layer: how many matrices an MLP has, and how wide they are where the
        configuration leaves it open, every kind of base model says in its own way.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(self.base)
        layer = base.get_submodule(f"{self.config.backbone.layers}.0")
        return sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all layers: the memory after a segment, or an open segment's keys and values."""
        return self._page.page_bytes * self.base.num_hidden_layers

    @property
    def state_bytes(self) -> int:
        """Bytes of what the next segment sees of a segment, which is what a memory takes on disk but for its header."""
        keys = self.segment_size * self.kv_bytes_per_token if self._page.keys_stay else 0
        return self._page.state_bytes * self.base.num_hidden_layers + keys

    @property
    def _page(self) -> PageLayout:
        import torch

        return self.config.page_layout(self.kv_heads, self.head_dim, getattr(torch, self.dtype))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the base model's KV cache per token, all layers."""
        import torch

        width, itemsize = self.kv_heads * self.head_dim, getattr(torch, self.dtype).itemsize
        return 2 * self.base.num_hidden_layers * width * itemsize

    def useful_flops(self, tokens: int) -> int:
        """Operations that an ARMT cannot do without to read so many tokens, a multiply-add counting two.

        Counted are all projections of tokens and memory tokens, the half of the attention square that
        causality leaves (in local layers the band), and reading and writing the memories. Not counted: the
        head, norms, position encoding, activation and feature map, and the row that only the normaliser z needs.
        """
        closed, rest = divmod(tokens, self.segment_size)
        m = self.config.num_mem_tokens
        return closed * self._cell_flops(self.segment_size + m, m) + self._cell_flops(rest, 0)

    def _cell_flops(self, rows: int, written: int) -> int:
        """One segment at all layers: `rows` tokens and memory tokens, of which `written` are written to memory."""
        from vllm_armt.config import ARMTConfig

        assert isinstance(self.config, ARMTConfig)
        base, d, p, K = self.base, self.base.hidden_size, self.config.d_mem, self.config.feature_size
        pairs = sum(attended_pairs(rows, reach) for reach in self.config.reaches)
        attention = 2 * base.num_attention_heads * self.head_dim * pairs
        read = rows * (d * p + K * d)
        write = written * (d * p + d * d + d + 2 * K * d)
        layers = base.num_hidden_layers * rows * self.layer_weights
        return 2 * (layers + attention + sum(self.config.has_memory) * (read + write))


def attended_pairs(rows: int, reach: int | None) -> int:
    """Queries and keys that meet in a segment of so many rows, each of which sees `reach`; None for all before it."""
    unseen = 0 if reach is None else max(0, rows - reach)
    return rows * (rows + 1) // 2 - unseen * (unseen + 1) // 2


def named(shape: str, dtype: str, segment_size: int, num_mem_tokens: int, d_mem: int) -> Model:
    """An ARMT of random weights around a base model of `SHAPES`.

    Raises:
        ValueError: there is no such shape or dtype, or a size is out of range.
    """
    if shape not in SHAPES:
        raise ValueError(f"--shape is {shape!r}; allowed: {', '.join(SHAPES)}. For a checkpoint give --model DIR.")
    _check_dtype(dtype)
    from transformers import LlamaConfig

    from vllm_armt.config import ARMTConfig

    base = LlamaConfig(
        **{"vocab_size": 32000, "max_position_embeddings": 8192, "eos_token_id": None, "bos_token_id": None}
        | SHAPES[shape]
    )
    config = ARMTConfig(
        base_model_config=base,
        segment_size=segment_size,
        num_mem_tokens=num_mem_tokens,
        d_mem=d_mem,
        model_dtype=dtype,
        architectures=["ARMTForCausalLM"],
    )
    return Model(shape, config, dtype)


def of_checkpoint(directory: Path, dtype: str, *, any_system: bool = False) -> Model:
    """The model in a directory: an ARMT, or with `any_system` any that is served.

    Raises:
        ValueError: the directory holds no such checkpoint, or there is no such dtype.
    """
    _check_dtype(dtype)
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"--model is {directory}, which has no config.json; give the directory of an ARMT checkpoint.")
    from vllm_armt.config import CONFIGS, ARMTConfig

    allowed = {config.model_type: config for config in (CONFIGS if any_system else (ARMTConfig,))}
    model_type = json.loads(file.read_text()).get("model_type")
    if model_type not in allowed:
        raise ValueError(
            f"--model is {directory}, whose config.json has the model_type {model_type!r}; it must be "
            f"{' or '.join(map(repr, allowed))}. Make an ARMT of a base model with `vllm-armt init`, or measure a "
            "--shape."
        )
    return Model(directory.name, allowed[model_type].from_pretrained(directory), dtype, directory)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
