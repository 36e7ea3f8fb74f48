"""What the models of all recurrences have in common: embeddings, the wave, the open rows, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_armt.attention import AttentionShape, LayerAttention
from vllm_armt.config import RecurrentConfig
from vllm_armt.executor.cuda_graphs import CUDAGraphCapture, GraphedTails
from vllm_armt.executor.parts import ModelParts
from vllm_armt.executor.step import Planner, Step
from vllm_armt.executor.tails import TailMetadata, run_tails
from vllm_armt.executor.wave import run_wave
from vllm_armt.integration.builder import PagedLayer
from vllm_armt.integration.reload import end_layerwise_reload
from vllm_armt.models.backbones import layers_class
from vllm_armt.models.weights import WeightTarget, load_exactly
from vllm_armt.options import Options
from vllm_armt.recurrence import Recurrence

WeightTargets = dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]]
"""By a checkpoint's name of a tensor, its shape and what loads it."""


class RecurrentForCausalLM(nn.Module):
    """A recurrent memory transformer on any backbone; a recurrence's class says what flows between segments."""

    layer_prefix = "layer."
    """Where a wrapped decoder layer of the checkpoint keeps the base model's own tensors."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vllm_config = vllm_config
        config: RecurrentConfig = vllm_config.model_config.hf_config
        base, dtype = config.base_model_config, vllm_config.model_config.dtype
        self.config = config
        self.is_loaded = False
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.max_model_len = vllm_config.model_config.max_model_len
        self.layout = config.segment_layout
        L, d = base.num_hidden_layers, base.hidden_size
        self.embed_tokens = VocabParallelEmbedding(base.vocab_size, d, params_dtype=dtype)
        self.position_embeddings: nn.Embedding | None = None
        if config.backbone.positions is not None:
            rows = base.max_position_embeddings + config.extra_positions
            self.position_embeddings = nn.Embedding(rows, d, dtype=dtype)
        backbone = layers_class(base)
        self.layers = backbone(base, config.num_positions, dtype)
        self.norm = backbone.final_norm(base, dtype)
        self.lm_head = ParallelLMHead(base.vocab_size, d, params_dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(base.vocab_size)
        memory_dtype = getattr(torch, config.memory_dtype) if config.memory_dtype else dtype
        self.recurrence = self.make_recurrence(memory_dtype)
        device, options = vllm_config.device_config.device, Options.of(vllm_config)
        page_layout = config.page_layout(self.layers.kv_heads, self.layers.head_dim, dtype)
        shape = AttentionShape(
            dtype,
            self.layers.heads,
            self.layers.kv_heads,
            self.layers.head_dim,
            self.layout,
            page_layout.columns,
            config.window,
        )
        self.attention = LayerAttention.choose(options.attention, device, shape, config.reaches)
        self.move = self.layers.moving_back(config.window_shift) if config.window_shift else None
        self.planner = Planner(config, options, self.attention, self.recurrence, dtype, device)
        self.paged = nn.ModuleList(
            PagedLayer(page_layout, self.planner, vllm_config, maybe_prefix(prefix, f"layers.{i}.pages"))
            for i in range(L)
        )

        # several ranks sum their parts in between, which a graph would have to be told of
        eager = vllm_config.model_config.enforce_eager or vllm_config.parallel_config.tensor_parallel_size > 1
        self.graphed_tails: GraphedTails | None = None
        if device.type == "cuda" and not eager:
            self.graphed_tails = GraphedTails(self._run_tails, CUDAGraphCapture())

    def make_recurrence(self, memory_dtype: torch.dtype) -> Recurrence:
        """The recurrence, with its parameters in `memory_dtype`."""
        raise NotImplementedError

    def recurrence_targets(self) -> WeightTargets:
        """The checkpoint's tensors of the recurrence."""
        raise NotImplementedError

    @staticmethod
    def get_model_state_cls() -> type:
        """What vLLM's model runner V2 plans a step of ours with."""
        # drags in a runner that not every platform has
        from vllm_armt.integration.model_state import PlanningState

        return PlanningState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.layers.embed(self.embed_tokens(input_ids))

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
        is_small = step.wave is None and len(inputs_embeds) <= self.max_num_seqs
        # there are no pages while vLLM measures memory
        if self.graphed_tails and step.tails and is_small and self._pages():
            return self.graphed_tails(step.tails, inputs_embeds)
        return self._run(step, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint in the authors' newest layout, and once it is there any of its tensors again.

        Args:
            weights: the first time all tensors; then also some, as trainers send them.

        Returns:
            The names of all parameters, as all of them are loaded then.

        Raises:
            ValueError: a tensor is unexpected, ill-shaped or, the first time, missing; it is named. Or vLLM has made
                the weights up.
        """
        vllm_config = self.vllm_config
        if vllm_config.load_config.load_format == "dummy":
            raise ValueError(
                "The weights were made up (load_format='dummy'), also those that no checkpoint has and that must be "
                "zero, so none can be loaded. Start with a checkpoint; its weights can then be loaded again, in whole "
                "or in part."
            )
        end_layerwise_reload(self, vllm_config.model_config)
        try:
            load_exactly(weights, self._targets(), self._may_be_ignored, may_lack=self.is_loaded)
        finally:
            # the first time vLLM does so
            if self.is_loaded:
                process_weights_after_loading(self, vllm_config.model_config, vllm_config.device_config.device)
        self.is_loaded = True
        return {name for name, _ in self.named_parameters()}

    def _run_tails(self, metadata: TailMetadata, inputs: Tensor) -> Tensor:
        return self._run(Step(None, metadata), inputs)

    def _run(self, step: Step, inputs: Tensor) -> Tensor:
        """Hidden states `[tokens, d]` from embeddings."""
        parts = ModelParts(
            self.layers,
            self.recurrence,
            self.attention,
            self.layout,
            self.position_embeddings,
            self.config.window,
            self._pages(),
            self.move,
        )
        # rows that vLLM pads the batch with belong to no request
        outputs = torch.zeros_like(inputs)
        if step.wave:
            run_wave(parts, step.wave, inputs, outputs)
        if step.tails:
            run_tails(parts, step.tails, inputs, outputs)
        return self.norm(outputs)

    def layer_name(self, layer: int) -> str:
        """A decoder layer's name in the checkpoint."""
        return f"model.{self.config.layers_attr}.{layer}"

    def _step(self, num_tokens: int) -> Step:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self.planner.dummy_step(num_tokens, self.max_num_seqs, self.max_model_len)
        assert isinstance(metadata, dict)
        return metadata[self.paged[0].prefix]

    def _pages(self):
        pages = [layer.pages for layer in self.paged]
        return None if pages[0] is None else pages

    def _targets(self) -> WeightTargets:
        """Every tensor that a checkpoint must have, by its name."""
        base, names, embed = self.config.base_model_config, self.config.backbone, self.embed_tokens
        vocabulary = (base.vocab_size, base.hidden_size)
        targets = self.recurrence_targets()
        targets[f"model.{names.embeddings}.weight"] = (vocabulary, partial(embed.weight_loader, embed.weight))
        if self.position_embeddings is not None:
            targets[f"model.{names.positions}.weight"] = _target(self.position_embeddings.weight)
        for name, parameter in self.norm.named_parameters():
            targets[f"model.{names.norm}.{name}"] = _target(parameter)
        if not self.config.tie_word_embeddings:
            head = self.lm_head
            targets[f"model.{names.head}.weight"] = (vocabulary, partial(head.weight_loader, head.weight))
        for i in range(base.num_hidden_layers):
            targets |= self.layer_targets(i, self.layers.weight_targets(), self.layer_prefix)
        return targets

    def layer_targets(self, layer: int, targets: Mapping[str, WeightTarget], prefix: str = "") -> WeightTargets:
        """The targets of one decoder layer, of those that stacked parameters have for all."""
        return {
            f"{self.layer_name(layer)}.{prefix}{name}": (target.shape, partial(target.load, layer))
            for name, target in targets.items()
        }

    def _may_be_ignored(self, name: str) -> bool:
        """Buffers that old transformers saved, and a head that is the embedding once more."""
        is_tied_head = self.config.tie_word_embeddings and name == f"model.{self.config.backbone.head}.weight"
        buffers = (
            "rotary_emb.inv_freq",
            ".attn.bias",
            ".attn.masked_bias",
            ".attention.bias",
            ".attention.masked_bias",
        )
        return is_tied_head or name.endswith(buffers)


def _target(parameter: Tensor) -> tuple[tuple[int, ...], Callable[[Tensor], object]]:
    """The target of a parameter that is loaded as it is."""
    return tuple(parameter.shape), parameter.data.copy_
