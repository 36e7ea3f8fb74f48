"""What a training run does, as its YAML file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from vllm_armt.babilong import TASKS, Whitespace, task_named


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(_Section):
    """How long the streams of a curriculum's level are, and how much happens in them.

    Attributes:
        segments: N, the length of a stream.
        facts: least and most facts a segment; each stream draws its own rate, evenly in the logarithm.
        questions: least and most questions a segment, asked in between.
        last: questions at the end of a stream.
    """

    segments: int
    facts: tuple[float, float]
    questions: tuple[float, float]
    last: int


class Stage(_Section):
    """One training with one optimizer.

    Attributes:
        name: of its directory.
        segment_size: S of this stage; the last stage's is the model's.
        levels: the curriculum, shortest first.
        max_steps: optimizer steps at most.
        tasks: shares of the tasks' streams.
        tokens_per_step: of a batch, all devices together.
        min_rows: streams of a batch at least, however long.
        advance: accuracy at which the next level begins; of answers from another segment, a running mean.
        finish: accuracy at which the last level, and so the stage, ends; null to train all its steps.
        patience: steps of a level at least.
        shorter: share of batches that come from an earlier level.
        hold: share of batches, from 4 segments on, with facts in the first quarter only.
        cut: share of streams in which a segment boundary runs through a fact that the last question needs.
        also_cut: share of the other facts of such a stream that are cut too, where no other takes the boundary. What a
            memory keeps of a sentence that was begun must go when it has been ended.
        overrun: share of streams, from 2 segments on, whose last question fills its segment, so that its answer, or the
            rest of it, begins the next one. There a model must find its end without seeing the question, as it must
            where a prompt fills its last segment. The stream goes on with text.
        lured: share of the questions, where there are any, that a later fact about the same person seems to answer
            otherwise: who has dropped a thing goes on without it. By themselves they are few.
        mentions: sentences of the background, with one of their words changed for a name of the tasks, that are strewn
            in, for every 1,000 tokens.
        distracting: share of the mentions that are sentences of `vllm_armt.babilong.distractors` in place of the
            background's: they name a person and a place and tell of no move.
        forms: share of facts, questions and distracting sentences that stand otherwise than between two sentences: on
            a line of their own, in quotes, in a list, at the very beginning; as a turn of a chat, with "Answer:".
        reworded: share of facts with other verbs than bAbI's.
        unknown: share of questions after whom or what nothing was told of, whose answer says so.
        empty: share of streams in which nothing is told at all.
        brief: share of streams of one segment that are facts and questions alone, as somebody types them.
        instructed: share of streams that begin with an instruction and with examples.
        shown: share of questions, but for the last, that are followed by their answers, as in a chat.
        paired: share of the mentions that have a person's name and a thing's, which are nearest to facts.
        broken: share of the mentions in which a segment boundary stands where it does in the cut facts that they are
            not: behind a person's name, or before that of a place or thing.
        language_weight: of the language model's loss beside the answers'.
        language_share: of the tokens, on how many that loss is taken.
        topic_weight: of the auxiliary loss: at a fact's last word and at a question mark a linear head on
            the output of layer `topic_layer` must say whom or what it is about.
        topic_layer: counted from 0.
        inference_weight: of another one: there a linear head on the output of layer `inference_layer` must say what
            has to be worked out before the answer can be, as where a thing was dropped, or who has it.
        inference_layer: counted from 0.
        begun_weight: of a last one: at the last word of a fact that a segment boundary cuts, a linear head on the
            output of layer `begun_layer` must say whom or what it is about, which stands in the segment before.
        begun_layer: counted from 0.
        size_weight: of how large the associative memories are, the mean of log(1 + |M|^2) over layers and streams, as a
            loss. Of large values under keys that hardly differ, what differs adds up: see docs/training-log.md.
        carry: share of batches whose streams go on from the memories that earlier such batches of their level left.
            These grow as old as those of texts of millions of tokens; gradients do not flow that far.
        truncate: segments that gradients flow through; null for all.
        schedule: order of the cells (segment, layer). "diagonal" makes one call of a diagonal's cells, with the same
            gradients: for GPUs, where one cell is too small. It runs whole streams only, so without `truncate`.
        training: arguments of transformers' `TrainingArguments`.
    """

    name: str
    segment_size: int
    levels: list[Level]
    max_steps: int
    tasks: dict[str, float]
    tokens_per_step: int = 2048
    min_rows: int = 4
    advance: float = 0.85
    finish: float | None = None
    patience: int = 60
    shorter: float = 0.0
    hold: float = 0.0
    cut: float = 0.0
    also_cut: float = 0.0
    overrun: float = 0.0
    lured: float = 0.0
    mentions: float = 0.0
    paired: float = 0.0
    broken: float = 0.0
    distracting: float = 0.0
    forms: float = 0.0
    reworded: float = 0.0
    unknown: float = 0.0
    empty: float = 0.0
    brief: float = 0.0
    instructed: float = 0.0
    shown: float = 0.0
    language_weight: float = 0.02
    language_share: float = 0.2
    topic_weight: float = 0.5
    topic_layer: int = 0
    inference_weight: float = 0.0
    inference_layer: int = 1
    begun_weight: float = 0.0
    begun_layer: int = 1
    size_weight: float = 0.0
    carry: float = 0.0
    truncate: int | None = None
    schedule: Literal["sequential", "diagonal"] = "sequential"
    training: dict[str, Any] = {}

    @property
    def heads(self) -> dict[str, tuple[int, float]]:
        """The auxiliary heads by what they must say, as `Stream` names it: the layer they read, and their weight."""
        heads = {
            "topics": (self.topic_layer, self.topic_weight),
            "inferences": (self.inference_layer, self.inference_weight),
            "begun": (self.begun_layer, self.begun_weight),
        }
        return {name: (layer, weight) for name, (layer, weight) in heads.items() if weight}

    @model_validator(mode="after")
    def _infers_something(self) -> Self:
        if self.inference_weight and not any(task_named(name).inferences for name in self.tasks):
            able = ", ".join(name for name, task in TASKS.items() if task.inferences)
            raise ValueError(
                f"`inference_weight` is {self.inference_weight}, but nothing is inferred in {', '.join(self.tasks)}. "
                f"Set it to 0, or train one of {able}."
            )
        return self

    @model_validator(mode="after")
    def _runs_whole_streams_in_diagonal_order(self) -> Self:
        for name in ("truncate", "carry", "size_weight"):
            if self.schedule == "diagonal" and getattr(self, name):
                raise ValueError(
                    f"`schedule` is 'diagonal' and `{name}` {getattr(self, name)}: the diagonal order keeps no "
                    f"memories behind a stream. Leave `{name}` out, or set `schedule` to 'sequential'."
                )
        return self


class Fresh(_Section):
    """A small model made from nothing.

    Attributes:
        vocab_size: of its tokenizer, trained on the background's training part and on stories.
        spaces: which word a space belongs to in its tokens, the one behind it ("leading") or the one before it
            ("trailing"). With trailing ones a name is the same token whatever stands before it: a space, a line end, a
            quote, nothing.
        like: a model of the same sizes whose weights this one begins with, its tokens' from the words that they
            stand for; null to draw all.
        hidden_size, intermediate_size, layers, heads: of the Llama.
        num_mem_tokens, d_mem, variant: of the memory.
        memory: false leaves the associative memories out, for comparison.
        embedding_std: of token embeddings and memory tokens.
        residual_gain: of what a layer adds to its residual stream, over a Llama of unit gain.
        memory_gain: of the memory's queries and keys. A large one: the rows are small and phi is quadratic in them.
        tie_queries: attention begins with W_k = W_q and the memory with W_mk = W_mq.
    """

    vocab_size: int = 1536
    spaces: Literal["leading", "trailing"] = "leading"
    like: Path | None = None
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    num_mem_tokens: int = 8
    d_mem: int = 32
    variant: str = "v2"
    memory: bool = True
    embedding_std: float = 0.15
    residual_gain: float = 0.5
    memory_gain: float = 4.0
    tie_queries: bool = True


class Validation(_Section):
    """How stages are judged, on stories and text of the validation part.

    Attributes:
        segments: lengths.
        questions: of each length, at least.
        facts: of a stream, wherever in it.
    """

    segments: list[int] = [1, 4, 16]
    questions: int = 300
    facts: int = 6


class Recipe(_Section):
    """A run: where it begins, and its stages.

    Attributes:
        output: directory of checkpoints and of the result.
        stages: one after another.
        model: a directory that `vllm-armt init` made, to train that; or
        fresh: a model made from nothing.
        background: directory with `train/*.txt` and `validation/*.txt`; null for streams of facts alone.
        whitespace: of the background: as it is, or collapsed to single spaces.
        seed: of weights, stories and text.
        threads: that torch computes with; null for all cores.
        dtype: of the weights while they are trained.
        lora: arguments of peft's `LoraConfig`. The base model's own weights are then frozen, adapters and
            the memory are trained, and the result has the adapters merged into it.
        validation: how stages are judged.

    `stage_defaults` in the file stand in every stage that does not say otherwise, `in_every_stage` in place of what a
    stage says. `like` names another recipe beside it, which says what this one does not.
    """

    output: Path
    stages: list[Stage]
    model: Path | None = None
    fresh: Fresh | None = None
    background: Path | None = Path("models/background")
    whitespace: Whitespace = "collapsed"
    seed: int = 0
    threads: int | None = None
    dtype: str = "float32"
    lora: dict[str, Any] | None = None
    validation: Validation = Validation()

    @classmethod
    def read(cls, file: Path, **overrides: Any) -> Self:
        """The recipe of a YAML file; `overrides` that are not None stand in for what it says.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type.
        """
        return cls(**_told_by(file) | {k: v for k, v in overrides.items() if v is not None})

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, data: dict[str, Any]) -> dict[str, Any]:
        defaults, overrides = data.get("stage_defaults", {}), data.get("in_every_stage", {})
        stages = []
        for stage in data.get("stages", ()):
            parts = (defaults, stage, overrides)
            training = {name: value for part in parts for name, value in part.get("training", {}).items()}
            stages.append(defaults | stage | overrides | {"training": training})
        kept = {name: value for name, value in data.items() if name not in ("stage_defaults", "in_every_stage")}
        return kept | {"stages": stages}

    @model_validator(mode="after")
    def _has_a_beginning(self) -> Self:
        if (self.model is None) == (self.fresh is None):
            raise ValueError("The recipe must say where the run begins: `model` (a directory) or `fresh`, one of both.")
        return self

    @model_validator(mode="after")
    def _weighs_memories_that_it_makes(self) -> Self:
        weighing = [stage.name for stage in self.stages if stage.size_weight]
        if self.fresh is not None and not self.fresh.memory and weighing:
            raise ValueError(
                f"`size_weight` of stage {', '.join(weighing)} weighs memories, but `memory` of `fresh` is false. Set "
                "`size_weight` to 0."
            )
        return self

    @model_validator(mode="after")
    def _has_the_text_that_stages_take(self) -> Self:
        for name, text in (("mentions", "are sentences"), ("overrun", "goes on with text")):
            if self.background is None and (stages := [stage.name for stage in self.stages if getattr(stage, name)]):
                raise ValueError(
                    f"`{name}` of stage {', '.join(stages)} {text} of the background, which is null. Name "
                    f"a directory in `background`, or set `{name}` to 0."
                )
        return self


def _told_by(file: Path) -> dict[str, Any]:
    told = yaml.safe_load(file.read_text())
    like = told.pop("like", None)
    return _told_by(file.parent / like) | told if like else told
