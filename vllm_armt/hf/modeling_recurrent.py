"""RecurrentForCausalLM: what all recurrent memory transformers around a transformers model have in common.

This is the readable truth that the server is compared with, and the model that is trained: the interface of
transformers around the segments that `SegmentwiseModel` runs.
"""

from __future__ import annotations

import os
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vllm_armt.config.base import one_of
from vllm_armt.hf.cache import RecurrentCache
from vllm_armt.hf.positions import draw_positions
from vllm_armt.hf.segments import SegmentwiseModel

Schedule = Literal["sequential", "diagonal"]


class RecurrentForCausalLM(SegmentwiseModel, GenerationMixin):
    """A recurrent memory transformer with a language-model head; the base of every system's own.

    Parameters have the names of the authors' newest code: `model.*` is the base model, and what a
    system adds to it stands beside it or in a wrapper around each decoder layer.
    """

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    @classmethod
    def from_base(cls, base: PreTrainedModel, segment_size: int, num_mem_tokens: int, **options: Any) -> Self:
        """A fresh model around a loaded base model, which is changed in place.

        Args:
            base: a causal language model of a supported type, in the dtype that it is to keep.
            segment_size: S. num_mem_tokens: m.
            options: further fields of the configuration, for an ARMT `d_mem` at least.
        """
        base.config.name_or_path = ""  # would put a path of this machine into config.json
        config = cls.config_class(
            base_model_config=base.config,
            model_dtype=base.dtype,
            segment_size=segment_size,
            num_mem_tokens=num_mem_tokens,
            **options,
        )
        with init.no_init_weights():
            model = cls(config, base)
        model.tie_weights()
        model.reset_memory()
        if config.extra_positions:
            draw_positions(model.model, config)
        model.generation_config = base.generation_config
        return model

    def reset_memory(self) -> None:
        """Draw what the system adds to the base model, memory rows at the scale of the embeddings."""
        std = self.get_input_embeddings().weight.float().std().item()
        for memory in self._memories():
            init.normal_(memory, std=std)

    def initialize_weights(self) -> None:
        # a PRMT has no parameters but its modules', for which transformers asks the base model's `_init_weights`
        super().initialize_weights()
        self.reset_memory()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save in the authors' layout; config.json states the dtypes that the weights have now."""
        memory_dtype = self._memories()[0].dtype
        self.config.model_dtype = _name(self.model.dtype)
        self.config.memory_dtype = None if memory_dtype == self.model.dtype else _name(memory_dtype)
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int | Tensor = 0,
        stay_open: bool = False,
        schedule: Schedule = "sequential",
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token, memory tokens not among them.

        Where no segment is open (a text begins, or `close_segment` was called) the tokens given are a
        prompt: generation policy "open" and segments that are not aligned to the left go by its length.
        Under "open" all tokens after it belong to its last segment.

        Args:
            input_ids: `[B, T]`; rows are independent.
            attention_mask: `[B, T]`, or with the tokens before; only padding on the right is allowed.
                Pads never reach the logits of real tokens, but count as tokens in the returned state.
            inputs_embeds: `[B, T, d]` instead of `input_ids`.
            labels: `[B, T]`, not shifted, -100 to leave a token out of the loss.
            past_key_values: the state that an earlier call returned, to go on from; it is changed.
            use_cache: return that state. Under "commit" any cut into calls gives the same logits.
            logits_to_keep: compute logits of the last so many tokens only, or of these indices; 0 for all.
            stay_open: put all the tokens into the open segment, even past S.
            schedule: order of the cells (segment, layer): one after another, or with "diagonal", for the
                training of an ARMT, all cells of a diagonal as one call. Results and gradients agree.
            kwargs: arguments of the loss function, such as `num_items_in_batch`.

        Raises:
            ValueError: padding on the left, gradient checkpointing where keys must be kept, flash
                attention where it cannot compute the model, more tokens than there are positions, or a
                schedule that does not go with the model or with other arguments.
        """
        _refuse_left_padding(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("There are no tokens: input_ids is empty.")
        one_of("schedule", schedule, get_args(Schedule))
        keep = bool(use_cache) or past_key_values is not None
        self._refuse_unsuited_settings(keep)
        cache = past_key_values
        if cache is None:
            cache = self._initial_state(inputs_embeds.shape[0])

        if schedule == "diagonal":
            _refuse_parts_of_texts(keep, stay_open)
            hidden = self._run_diagonally(inputs_embeds, cache)
        else:
            hidden = self._run_sequentially(inputs_embeds, cache, stay_open, keep)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.base_model_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)

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
        if self.config.needs_prompt_length and not is_first_iteration and inputs.get("past_key_values") is None:
            raise ValueError(
                "generation_policy 'open' keeps the prompt's last segment open, which only the state tells from "
                "new tokens: generate with use_cache=True."
            )
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # the first step of `generate` makes a RecurrentCache; a DynamicCache would keep the whole text
        return False

    def _refuse_unsuited_settings(self, keep: bool) -> None:
        windowed = self.config.window is not None
        if (windowed or keep) and self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing keeps no keys, which a window over the segment before needs: train without it."
                if windowed
                else "Gradient checkpointing keeps no KV to go on from: call with use_cache=False."
            )
        if (windowed or self.config.wrap_pos) and "flash" in self.model.config._attn_implementation:
            raise ValueError(
                "A window over the segment before and positions that jump (`wrap_pos`) need an attention mask, which "
                "flash attention does not take: load the model with attn_implementation='sdpa'."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_parts_of_texts(keep: bool, stay_open: bool) -> None:
    if keep or stay_open:
        raise ValueError(
            "schedule is 'diagonal', which runs whole texts and keeps nothing to go on from: call without use_cache, "
            "past_key_values and stay_open, or with schedule='sequential'."
        )


def _refuse_left_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError(
            "attention_mask has padding before real tokens. Segments are counted from the first position, so it would "
            "shift their boundaries: pad on the right (tokenizer.padding_side = 'right')."
        )
