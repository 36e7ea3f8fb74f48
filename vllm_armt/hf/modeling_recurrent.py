"""RecurrentForCausalLM: what all recurrent memory transformers around a transformers model have in common.

A text is cut into segments of S tokens. Each segment is one call of the base model on the rows
`[prefix | tokens | suffix]`: attention, positions and KV begin anew, and only what the system lets
flow from segment to segment goes on.

A segment is written when the next token arrives, not when its S-th token does. No logits depend on
the difference, the last segment of a text costs no memory tokens, and the two generation policies
become one question: may the open segment close?

This is the readable truth that the server is compared with, and the model that is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vllm_armt.config import RecurrentConfig
from vllm_armt.config.refused import one_of
from vllm_armt.hf.cache import RecurrentCache

Schedule = Literal["sequential", "diagonal"]

HiddenStates = tuple[Tensor, ...]
"""`[B, rows, d]` each: what the final norm gives, last; before it, where asked for, the input of every layer."""


def is_memory(name: str) -> bool:
    """Whether a parameter of this name is a system's own, and not the base model's."""
    return name.endswith(("memory", "sink")) or ".W_m" in name


@dataclass(frozen=True)
class Call:
    """The rows of one segment that the base model runs on: `[prefix | tokens | suffix]`.

    Attributes:
        cache: the texts so far.
        prefix: rows of the prefix among them; 0 unless the segment begins here.
        suffix: rows of the suffix among them; 0 unless the segment closes here.
    """

    cache: RecurrentCache
    prefix: int
    suffix: int


class RecurrentLayer(nn.Module):
    """A decoder layer of the base model into which something of the segments before flows.

    The model sets `call` around each forward of the base model: not every base model hands its layers
    further arguments.
    """

    call: Call

    def __init__(self, layer: nn.Module, layer_idx: int):
        super().__init__()
        self.layer = layer
        self.layer_idx = layer_idx


def rows_of(output: Any) -> Tensor:
    """Hidden states `[B, rows, d]` of what a decoder layer returns: some base models' layers return a tuple."""
    return output[0] if isinstance(output, tuple) else output


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent memory transformer with a language-model head: the base model `model`, what a system adds to
    it, and how both run; each system states what differs.

    Parameters have the names of the authors' newest code: `model.*` is the base model, and what a
    system adds to it stands beside it or in a wrapper around each decoder layer.

    Args:
        config: of the whole model.
        base: a base model to build around, which is changed in place; None for a fresh one.
    """

    base_model_prefix = ""
    # constants that transformers once saved
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"\brotary_emb\.inv_freq$",
        r"\b(attn|attention)\.(bias|masked_bias)$",
    ]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, config: RecurrentConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = base or AutoModelForCausalLM.from_config(config.base_model_config)
        if config.extra_positions:
            _widen_positions(self.model, config)
        self._add_memory(getattr(torch, config.memory_dtype) if config.memory_dtype else self.model.dtype)
        self.post_init()

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
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
            logits_to_keep: number of last tokens whose logits are computed, 0 for all; or indices of tokens.
            output_hidden_states: also return, as transformers does, the embeddings and the output of every layer, the
                top one's after the final norm: L + 1 tensors `[B, T, d]`, of the tokens alone. None for what
                the configuration says.
            output_attentions: not supported: a segment attends to itself, so a text has no `[T, T]` weights.
            stay_open: put all the tokens into the open segment, even past S.
            schedule: order of the cells (segment, layer): one after another, or with "diagonal", for the
                training of an ARMT, all cells of a diagonal as one call. Results and gradients agree.
            kwargs: arguments of the loss function, such as `num_items_in_batch`.

        Raises:
            ValueError: padding on the left, gradient checkpointing where keys must be kept, flash
                attention where it cannot compute the model, more tokens than there are positions, a
                schedule that does not go with the model or with other arguments, or attention weights asked for.
        """
        _refuse_left_padding(attention_mask)
        every_layer = self._wants_every_layer(output_hidden_states, output_attentions)
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
            hidden = self._run_diagonally(inputs_embeds, cache, every_layer)
        else:
            hidden = self._run_sequentially(inputs_embeds, cache, stay_open, keep, every_layer)
        indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[-1][:, indices])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.base_model_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if keep else None,
            hidden_states=hidden if every_layer else None,
        )

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

    def _run_diagonally(self, embeds: Tensor, state: RecurrentCache, every_layer: bool) -> HiddenStates:
        """Hidden states of whole texts, from their embeddings `[B, T, d]` and the state before them."""
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

    def _run_sequentially(
        self, embeds: Tensor, cache: RecurrentCache, stay_open: bool, keep_kv: bool, every_layer: bool
    ) -> HiddenStates:
        """Hidden states of tokens, from their embeddings `[B, T, d]`, segment by segment."""
        *closed, last = self._split(embeds, cache, stay_open)
        segments = [self._run_segment(tokens, cache, close=True, every_layer=every_layer) for tokens in closed]
        segments.append(self._run_segment(last, cache, close=False, keep_kv=keep_kv, every_layer=every_layer))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))

    def _split(self, embeds: Tensor, cache: RecurrentCache, stay_open: bool) -> tuple[Tensor, ...]:
        """Cut `[B, T, d]` where segments end; all pieces but the last end theirs."""
        T = embeds.shape[1]
        if stay_open or (cache.open_tokens and self.config.needs_prompt_length):
            return (embeds,)
        if cache.open_tokens >= self.config.segment_size:
            self.close_segment(cache)
        pieces = self.config.segmentation(T).split(cache.open_tokens, cache.open_tokens + T)
        return embeds.split([piece.n for piece in pieces], dim=1)

    def _run_segment(
        self, tokens: Tensor, cache: RecurrentCache, *, close: bool, keep_kv: bool = False, every_layer: bool = False
    ) -> HiddenStates:
        """Run the next tokens of the open segment, its prefix before and its suffix behind them where due.

        Args:
            tokens: embeddings `[B, n, d]`.
            cache: the text so far.
            close: end the segment and write its memory.
            keep_kv: keep the keys and values of a segment that stays open.
            every_layer: return the hidden states of every layer.

        Returns:
            Hidden states of the tokens, `[B, n, d]`.
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
            # rotary positions that grow over the text leave the keys of a window as far back as they are
            position_ids = torch.tensor(positions, device=rows.device)[None] + cache.segments * config.window_shift
            hidden = self._run_base(rows, position_ids, self._mask(rows, cache, n), cache.kv, every_layer)
        cache.tokens += n
        cache.open_tokens += n
        if close:
            self._finish(hidden[-1][:, call.prefix + n :], cache)
            cache.end_segment(window_begin=layout.prefix if config.window else None)
        return tuple(states[:, call.prefix : call.prefix + n] for states in hidden)

    def _run_base(
        self,
        rows: Tensor,
        positions: Tensor,
        mask: Tensor,
        kv: DynamicCache | None = None,
        every_layer: bool = False,
    ) -> HiddenStates:
        """Hidden states of `rows` `[B, rows, d]`, at positions `[1 or B, rows]`."""
        inputs: list[Tensor] = []
        with ExitStack() as hooks:
            # not what transformers records: its hooks sit on the base model's own layers, behind the read of a memory
            for layer in self._layers if every_layer else ():
                hooks.enter_context(layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
            output = self.model.base_model(
                inputs_embeds=rows,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=kv,
                use_cache=kv is not None,
            )
        return *inputs, output.last_hidden_state

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

    # the interface of transformers

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
            _draw_positions(model.model, config)
        model.generation_config = base.generation_config
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint, of which every tensor must be there and have its place; see transformers.

        Raises:
            ValueError: a tensor is missing, of another shape, or has no place. Transformers would draw it at random, or
                leave it out, and only report so.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_other_tensors(info, args[0] if args else "The checkpoint")
        return (model, info) if output_loading_info else model

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

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

    def _wants_every_layer(self, output_hidden_states: Any, output_attentions: Any) -> bool:
        """Whether hidden states are asked for: by the call or, where that says nothing, by the configuration."""
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions is True, but tokens attend within their segments, and the memory between these has "
                "no attention weights: a text has none to return. Leave it out."
            )
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if asked not in (None, True, False):
            # transformers' own base models take indices of layers, too
            raise ValueError(f"output_hidden_states is {asked!r}; allowed: True (of every layer) and False.")
        return bool(asked)

    def _refuse_unsuited_settings(self, keep: bool) -> None:
        windowed = self.config.window is not None
        if (windowed or keep) and self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing keeps no keys, which a window over the segment before needs: train without it."
                if windowed
                else "Gradient checkpointing keeps no KV to go on from: call with use_cache=False."
            )
        uses_flash = "flash" in self.model.config._attn_implementation
        if uses_flash and self.model.config.model_type == "gpt_neo" and any(self.config.reaches):
            raise ValueError(
                "transformers' flash attention of a gpt_neo takes its local layers for global ones: load the model "
                "with attn_implementation='eager'."
            )
        if uses_flash and (windowed or self.config.wrap_pos or self.config.full_suffix):
            raise ValueError(
                "A window over the segment before, memory tokens that see one another (`memory_attention`) and "
                "positions that jump (`wrap_pos`) need an attention mask, which flash attention does not take: load "
                "the model with attn_implementation='sdpa'."
            )


def check_positions(positions: list[int], config: RecurrentConfig) -> None:
    """Refuse rows whose position the base model has not learned.

    Args:
        positions: of the prefix and the tokens, and of a suffix that has none of its own.

    Raises:
        ValueError: one lies beyond the base model's.
    """
    if config.backbone.positions is None:
        return
    learned = config.base_model_config.max_position_embeddings
    needed = max(positions, default=0) + 1 - (config.prefix_rows if config.wrap_pos else 0)
    if needed > learned:
        raise ValueError(
            f"The text needs {needed} learned positions, but the base model has {learned}: give it fewer tokens"
            + (", or close the open segment (`close_segment`)." if config.learned_positions == "restart" else ".")
        )


def _refuse_other_tensors(info: dict[str, Any], name: Any) -> None:
    """Refuse a checkpoint by what transformers reports of its tensors."""
    problems = {
        "lacks tensors that its config.json asks for": info.get("missing_keys"),
        "has tensors of another shape than its config.json asks for": info.get("mismatched_keys"),
        "has tensors that a model of its config.json does not": info.get("unexpected_keys"),
    }
    for problem, found in problems.items():
        if found:
            names = sorted(key if isinstance(key, str) else key[0] for key in found)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(
                f"{name} {problem}: {', '.join(names[:8])}{more}. A checkpoint of the research code is brought here by "
                "`vllm-armt convert SRC DST`, a base model is given a memory by `vllm-armt init`."
            )


def _widen_positions(base: PreTrainedModel, config: RecurrentConfig) -> None:
    """Add `config.extra_positions` rows: the prefix' before the base model's P, the suffix' after them."""
    name = config.backbone.positions
    old = base.get_submodule(name).weight.detach()
    wide = nn.Embedding(len(old) + config.extra_positions, old.shape[1], device=old.device, dtype=old.dtype)
    base.set_submodule(name, wide)
    _position_parts(base, config)[1].data.copy_(old)


def _draw_positions(base: PreTrainedModel, config: RecurrentConfig) -> None:
    """Draw the added rows at the scale of the base model's own."""
    prefix, old, suffix = _position_parts(base, config)
    for new in (prefix, suffix):
        init.normal_(new.data, std=old.float().std().item())


def _position_parts(base: PreTrainedModel, config: RecurrentConfig) -> tuple[Tensor, ...]:
    """The rows of the prefix, of the base model and of the suffix: views."""
    first, learned = config.prefix_rows, config.base_model_config.max_position_embeddings
    return torch.tensor_split(base.get_submodule(config.backbone.positions).weight, (first, first + learned))


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
