"""ARMTForCausalLM: the sequential definition of ARMT around a transformers model.

This is the readable truth that the server is compared with, and the model that is trained. A text is
cut into segments of S tokens. Each segment is one call of the base model on [tokens, memory tokens]:
attention, positions and KV begin anew, and only the associative memories of the layers go on.

A segment is written when the next token arrives, not when its S-th token does. No logits depend on
the difference, the last segment of a text costs no memory tokens, and the two generation policies
become one question: may the open segment close?
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vllm_armt.config import ARMTConfig
from vllm_armt.core import split_chunk
from vllm_armt.hf.cache import ARMTCache
from vllm_armt.hf.layer import ARMTLayer


class ARMTForCausalLM(PreTrainedModel, GenerationMixin):
    """An associative recurrent memory transformer with a language-model head.

    Parameters have the names of the authors' newest code: `memory` `[m, d]`, the embeddings of the
    memory tokens, and `model.*`, the base model with an `ARMTLayer` around each decoder layer.

    Args:
        config: of the whole model.
        base: a base model to build around, which is changed in place; None for a fresh one.
    """

    config_class = ARMTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["ARMTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, config: ARMTConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = base or AutoModelForCausalLM.from_config(config.base_model_config)
        dtype = getattr(torch, config.memory_dtype) if config.memory_dtype else self.model.dtype
        self.memory = nn.Parameter(
            torch.empty(config.num_mem_tokens, config.base_model_config.hidden_size, dtype=dtype)
        )
        decoder = self.model.base_model
        decoder.layers = nn.ModuleList(
            ARMTLayer(layer, config, i, memory_dtype=dtype) for i, layer in enumerate(decoder.layers)
        )
        self.post_init()

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, segment_size: int, num_mem_tokens: int, d_mem: int, **options: Any
    ) -> ARMTForCausalLM:
        """A fresh ARMT around a loaded base model, which is changed in place.

        Within the first segment it computes what the base model does, and everywhere until W_mv is
        trained: W_mv is zero.

        Args:
            base: a causal language model of a supported type, in the dtype that it is to keep.
            segment_size: S. num_mem_tokens: m. d_mem: p.
            options: further fields of `ARMTConfig`.
        """
        base.config.name_or_path = ""  # would put a path of this machine into config.json
        config = ARMTConfig(
            base_model_config=base.config,
            model_dtype=base.dtype,
            segment_size=segment_size,
            num_mem_tokens=num_mem_tokens,
            d_mem=d_mem,
            **options,
        )
        with init.no_init_weights():
            model = cls(config, base)
        model.tie_weights()
        model.reset_memory()
        model.generation_config = base.generation_config
        return model

    def reset_memory(self) -> None:
        """Draw the memory tokens at the scale of the embeddings, and every layer's memory projections."""
        init.normal_(self.memory, std=self.get_input_embeddings().weight.float().std().item())
        for module in self.modules():
            if isinstance(module, ARMTLayer):
                module.reset_memory()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.reset_memory()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save in the authors' layout; config.json states the dtypes that the weights have now."""
        self.config.model_dtype = _name(self.model.dtype)
        self.config.memory_dtype = None if self.memory.dtype == self.model.dtype else _name(self.memory.dtype)
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ARMTCache | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int | Tensor = 0,
        stay_open: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token, memory tokens not among them.

        Args:
            input_ids: `[B, T]`; rows are independent, and segments are counted from the first token.
            attention_mask: `[B, T]`, or with the tokens before; only padding on the right is allowed.
                Pads never reach the logits of real tokens, but count as tokens in the returned state.
            inputs_embeds: `[B, T, d]` instead of `input_ids`.
            labels: `[B, T]`, not shifted, -100 to leave a token out of the loss.
            past_key_values: the state that an earlier call returned, to go on from; it is changed.
            use_cache: return that state. Any cut into calls gives the same logits.
            logits_to_keep: compute logits of the last so many tokens only, or of these indices; 0 for all.
            stay_open: put all the tokens into the open segment, even past S.
            kwargs: arguments of the loss function, such as `num_items_in_batch`.

        Raises:
            ValueError: padding on the left, or gradient checkpointing with a state to keep.
        """
        _refuse_left_padding(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        keep = bool(use_cache) or past_key_values is not None
        if keep and self.training and self.is_gradient_checkpointing:
            raise ValueError("Gradient checkpointing keeps no KV to go on from: call with use_cache=False.")
        cache = past_key_values if past_key_values is not None else self._empty_cache(inputs_embeds)

        *closed, last = self._split(inputs_embeds, cache, stay_open)
        hidden = [self._run_segment(tokens, cache, close=True) for tokens in closed]
        hidden.append(self._run_segment(last, cache, close=False, keep_kv=keep))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(torch.cat(hidden, dim=1)[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.base_model_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)

    def close_segment(self, cache: ARMTCache) -> None:
        """Write the open segment to memory: its memory tokens run on top of its KV, which is dropped.

        The next token opens a new segment, even if this one was not full.

        Raises:
            ValueError: no segment is open.
        """
        if cache.open_tokens == 0:
            raise ValueError("No segment is open: there is nothing to write to memory.")
        embeddings = self.get_input_embeddings().weight
        self._run_segment(embeddings.new_empty(cache.batch_size, 0, embeddings.shape[1]), cache, close=True)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`, under `config.generation_policy`.

        Raises:
            ValueError: padding, or the policy "open" with `use_cache=False`.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.all():
            raise ValueError(
                "The prompts of this batch are padded. Pads would count as tokens and shift the segments: generate "
                "from prompts of equal length, or from one prompt at a time."
            )
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if self.config.generation_policy == "open" and not is_first_iteration:
            if inputs.get("past_key_values") is None:
                raise ValueError(
                    "generation_policy 'open' keeps the prompt's last segment open, which only the state tells from "
                    "new tokens: generate with use_cache=True."
                )
            inputs["stay_open"] = True
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # the first step of `generate` makes an ARMTCache; a DynamicCache would keep the whole text
        return False

    def _empty_cache(self, embeds: Tensor) -> ARMTCache:
        dtype = torch.promote_types(self.memory.dtype, torch.float32)
        return ARMTCache.empty(self.config, embeds.shape[0], embeds.device, dtype)

    def _split(self, embeds: Tensor, cache: ARMTCache, stay_open: bool) -> tuple[Tensor, ...]:
        """Cut `[B, T, d]` where segments end; all pieces but the last end theirs."""
        T, S = embeds.shape[1], self.config.segment_size
        if T == 0:
            raise ValueError("There are no tokens: input_ids is empty.")
        if stay_open:
            return (embeds,)
        if cache.open_tokens >= S:
            self.close_segment(cache)
        pieces = split_chunk(cache.open_tokens, cache.open_tokens + T, S)
        return embeds.split([piece.n for piece in pieces], dim=1)

    def _run_segment(self, tokens: Tensor, cache: ARMTCache, *, close: bool, keep_kv: bool = False) -> Tensor:
        """Run the next tokens of the open segment, its memory tokens behind them if it closes.

        Args:
            tokens: embeddings `[B, n, d]`.
            cache: the text so far.
            close: end the segment and write its memory.
            keep_kv: keep the keys and values of a segment that stays open.

        Returns:
            Final hidden states of the tokens, `[B, n, d]`.
        """
        B, n, _ = tokens.shape
        num_writes = self.config.num_mem_tokens if close else 0
        if keep_kv and cache.kv is None:
            cache.kv = DynamicCache(config=self.config.base_model_config)
        memory_tokens = self.memory[:num_writes].to(tokens.dtype).expand(B, -1, -1)
        output = self.model.base_model(
            inputs_embeds=torch.cat([tokens, memory_tokens], dim=1),
            past_key_values=cache.kv,
            use_cache=cache.kv is not None,
            cache=cache,
            num_writes=num_writes,
        )
        cache.tokens += n
        cache.open_tokens += n
        if close:
            cache.segments += 1
            cache.open_tokens, cache.kv = 0, None
        return output.last_hidden_state[:, :n]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_left_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError(
            "attention_mask has padding before real tokens. Segments are counted from the first position, so it would "
            "shift their boundaries: pad on the right (tokenizer.padding_side = 'right')."
        )
