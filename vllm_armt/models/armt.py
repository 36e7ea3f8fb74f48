"""ARMTForCausalLM as vLLM runs it: embeddings, the wave, the open rows, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_armt.cache.pages import PageLayout
from vllm_armt.config import ARMTConfig
from vllm_armt.diagonal.attention import choose_attention
from vllm_armt.diagonal.memory import StackedMemory
from vllm_armt.diagonal.open_rows import run_open
from vllm_armt.diagonal.stack import Stack
from vllm_armt.diagonal.wave import run_wave
from vllm_armt.models.backbones.llama import LlamaLayers
from vllm_armt.models.step import PagedLayer, Planner, Step
from vllm_armt.models.weights import Slot, load_exactly
from vllm_armt.options import Options


class ARMTForCausalLM(nn.Module):
    """An associative recurrent memory transformer on a Llama-family backbone."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ARMTConfig = vllm_config.model_config.hf_config
        base, dtype = config.base_model_config, vllm_config.model_config.dtype
        memory_dtype = getattr(torch, config.memory_dtype) if config.memory_dtype else dtype
        L, d, S, m = base.num_hidden_layers, base.hidden_size, config.segment_size, config.num_mem_tokens
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(base.vocab_size, d, params_dtype=dtype)
        self.memory_tokens = nn.Parameter(torch.empty(m, d, dtype=memory_dtype), requires_grad=False)
        self.layers = LlamaLayers(base, S + m, dtype)
        self.memory = StackedMemory(L, d, config.d_mem, config.memory_rule, memory_dtype)
        layout = PageLayout(
            S,
            m,
            self.layers.kv_heads,
            self.layers.head_dim,
            dtype,
            config.feature_size,
            d,
            getattr(torch, config.state_dtype),
        )
        device, options = vllm_config.device_config.device, Options.of(vllm_config)
        self.attention = choose_attention(options.attention, device, dtype, self.layers.head_dim, S + m)
        self.planner = Planner(config, options, self.attention, dtype, device)
        self.paged = nn.ModuleList(
            PagedLayer(layout, self.planner, vllm_config, maybe_prefix(prefix, f"layers.{i}.pages")) for i in range(L)
        )
        self.norm = RMSNorm(d, eps=base.rms_norm_eps, dtype=dtype)
        self.lm_head = ParallelLMHead(base.vocab_size, d, params_dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(base.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[tokens, d]` of the step's tokens, in input order, ready for the head."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        step = self._step(inputs_embeds.shape[0])
        stack = Stack(
            self.layers, self.memory, self.attention, self.memory_tokens, self._pages(), self.config.segment_size
        )
        # rows that vLLM pads the batch with belong to no request
        outputs = torch.zeros_like(inputs_embeds)
        if step.wave:
            run_wave(stack, step.wave, inputs_embeds, outputs)
        if step.tails:
            run_open(stack, step.tails, inputs_embeds, outputs)
        return self.norm(outputs)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint in the authors' newest layout.

        Raises:
            ValueError: a tensor is unexpected, ill-shaped or missing; it is named.
        """
        load_exactly(weights, self._slots(), self._may_be_ignored)
        return {name for name, _ in self.named_parameters()}

    def _step(self, num_tokens: int) -> Step:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self.planner.rehearsal(num_tokens)
        assert isinstance(metadata, dict)
        return metadata[self.paged[0].prefix]

    def _pages(self):
        pages = [layer.pages for layer in self.paged]
        return None if pages[0] is None else pages

    def _slots(self) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]]:
        """Every tensor that a checkpoint must have, by its name."""
        base = self.config.base_model_config
        d, vocab = base.hidden_size, base.vocab_size
        embed = self.embed_tokens
        slots = {
            "memory": (tuple(self.memory_tokens.shape), self.memory_tokens.data.copy_),
            "model.model.embed_tokens.weight": ((vocab, d), partial(embed.weight_loader, embed.weight)),
            "model.model.norm.weight": ((d,), self.norm.weight.data.copy_),
        }
        if not self.config.tie_word_embeddings:
            head = self.lm_head
            slots["model.lm_head.weight"] = ((vocab, d), partial(head.weight_loader, head.weight))
        memory = Slot.of_linear("", self.memory.read_projection) | Slot.of_linear("", self.memory.write_projection)
        # only W_mb has a bias; those of W_mk and W_mv stay zero
        memory = {name: slot for name, slot in memory.items() if name not in ("W_mk.bias", "W_mv.bias")}
        layer_slots = {f"layer.{name}": slot for name, slot in self.layers.slots().items()}
        for i, has_memory in enumerate(self.config.has_memory):
            for name, slot in (layer_slots | memory if has_memory else layer_slots).items():
                slots[f"model.{self.config.layers_attr}.{i}.{name}"] = (slot.shape, partial(slot.load, i))
        return slots

    def _may_be_ignored(self, name: str) -> bool:
        """Buffers that old transformers saved, and a head that is the embedding once more."""
        head_is_embedding = bool(self.config.tie_word_embeddings)
        return name.endswith("rotary_emb.inv_freq") or (head_is_embedding and name == "model.lm_head.weight")
