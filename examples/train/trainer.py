"""transformers' Trainer on streams: gradients through segments, the curriculum, and what is logged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from examples.train.batches import Batches
from examples.train.carried import Carried, cut_off
from examples.train.curriculum import Curriculum
from examples.train.forward import Counts, forward
from examples.train.gates import gates_of
from examples.train.recipe import Stage
from examples.train.streams import NONE
from vllm_armt.hf import RecurrentForCausalLM


class StreamTrainer(Trainer):
    """Trains a stage of a recipe.

    Args:
        model: a recurrent memory transformer of `vllm_armt.hf`.
        args: of transformers.
        stage: what is trained on.
        batches: of the stage.
        curriculum: of the stage.

    Raises:
        ValueError: the diagonal order of a model that is to be cut up, a weight of gates or memories that it does not
            have, or an auxiliary head on a layer that it does not have.
    """

    def __init__(
        self,
        model: RecurrentForCausalLM,
        args: TrainingArguments,
        stage: Stage,
        batches: Batches,
        curriculum: Curriculum,
    ) -> None:
        self.carried = Carried()
        super().__init__(model, args, train_dataset=batches, callbacks=[curriculum, self.carried])
        if stage.schedule == "diagonal" and self.is_fsdp_enabled:
            raise ValueError(
                "`schedule` is 'diagonal', which needs all weights of the layers at once, but FSDP cuts them up. Train "
                "without FSDP, or set `schedule` to 'sequential'."
            )
        if stage.size_weight and not gates_of(model):
            raise ValueError(
                f"`size_weight` is {stage.size_weight}, but no layer of this model has an associative memory, which it "
                "would weigh. Set it to 0."
            )
        depth = len(model.model.get_submodule(model.config.backbone.layers))
        for name, (layer, _) in stage.heads.items():
            if not 0 <= layer < depth:
                raise ValueError(
                    f"The auxiliary head for {name!r} is to read layer {layer}, but this model has the layers 0 to "
                    f"{depth - 1}. Choose one of these as `topic_layer`, `inference_layer` or `begun_layer`."
                )
        self.stage = stage
        self.curriculum = curriculum
        self._start_line()

    def get_train_dataloader(self) -> DataLoader:
        """Whole batches; each device draws its own."""
        return DataLoader(self.train_dataset, batch_size=None)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """A forward and a backward pass; with truncation, one for every stretch of segments."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        level, carries = int(inputs.pop("level")), bool(inputs.pop("carries"))
        inner = self.accelerator.unwrap_model(model)
        heads = self.stage.heads
        asked = {name: (inputs[name] != NONE).sum().clamp(min=1) for name in heads}
        total, counts = torch.zeros((), device=self.args.device), torch.zeros(6, device=self.args.device)
        said = dict.fromkeys(heads, total)
        state = self.carried.states.get(level) if carries else None
        for part, goes_on in self._stretches(inputs):
            with self.compute_loss_context_manager():
                outcome = forward(
                    model,
                    inner,
                    part,
                    {name: layer for name, (layer, _) in heads.items()},
                    schedule=self.stage.schedule,
                    past_key_values=state,
                    use_cache=goes_on or carries or self.stage.size_weight > 0,
                )
                share = part["ids"].shape[1] / inputs["ids"].shape[1]
                loss = outcome.loss + self.stage.size_weight * outcome.size * share
                for name, (_, weight) in heads.items():
                    loss = loss + weight * outcome.auxiliary[name] / asked[name]
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            total = total + loss.detach()
            said = {name: sum_ + outcome.auxiliary[name].detach() / asked[name] for name, sum_ in said.items()}
            counts += outcome.counts
            if goes_on or carries:
                state = cut_off(inner, outcome.cache)
        if carries and state is not None:
            self.carried.states[level] = state
        self._note(level, Counts(*self.accelerator.reduce(counts).int().tolist()), said, inputs["ids"].numel())
        return total / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add how many answers were right since the last line, and the speed."""
        if "loss" in logs:
            total = Counts(*(sum(column) for column in zip(*self.counts, strict=True)))
            for kind in ("same", "cross", "cut"):
                if answers := getattr(total, kind):
                    logs[f"accuracy_{kind}"] = round(getattr(total, f"{kind}_right") / answers, 4)
            for name, loss in self.auxiliary.items():
                logs[f"loss_{name}"] = round(float(loss) / len(self.counts), 4)
            logs["segments"] = self.stage.levels[self.curriculum.level].segments
            logs["tokens_per_second"] = round(self.tokens / (time.perf_counter() - self.begun))
            self._start_line()
        super().log(logs, start_time)

    def _start_line(self) -> None:
        self.begun = time.perf_counter()
        self.tokens = 0
        self.auxiliary: dict[str, Tensor] = {}
        self.counts: list[Counts] = []

    def _note(self, level: int, counts: Counts, auxiliary: dict[str, Tensor], tokens: int) -> None:
        self.counts.append(counts)
        for name, loss in auxiliary.items():
            self.auxiliary[name] = self.auxiliary.get(name, 0) + loss
        self.tokens += tokens * self.args.world_size
        if self.stage.levels[level].segments == 1:
            self.curriculum.count(level, counts.same_right, counts.same)
        else:
            self.curriculum.count(level, counts.cross_right, counts.cross)

    def _stretches(self, inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """The batch in stretches that gradients flow through, and of each whether another follows."""
        T = inputs["ids"].shape[1]
        length = T if self.stage.truncate is None else self.stage.truncate * self.stage.segment_size
        for begin in range(0, T, length):
            yield {name: x[:, begin : begin + length] for name, x in inputs.items()}, begin + length < T
