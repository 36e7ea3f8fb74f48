"""How a model in training does on stories and text of the validation part."""

from __future__ import annotations

import torch

from examples.train.batches import Batches
from examples.train.carried import copies
from examples.train.forward import Counts, forward
from examples.train.recipe import Level, Stage, Validation
from examples.train.streams import Streams
from vllm_armt.babilong import wilson
from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM

LAST = 4
"""Questions at the end of each stream; none is asked before."""

ROWS = 8


class _Begin:
    step = level = 0


def validate(
    model: RecurrentForCausalLM, streams: Streams, stage: Stage, wanted: Validation
) -> dict[str, dict[str, dict[str, float]]]:
    """What `accuracy` finds, by the task and the number of segments."""
    model.eval()
    return {
        task: {
            str(segments): accuracy(model, streams, stage.model_copy(update={"tasks": {task: 1.0}}), segments, wanted)
            for segments in wanted.segments
        }
        for task in stage.tasks
    }


def accuracy(
    model: RecurrentForCausalLM,
    streams: Streams,
    stage: Stage,
    segments: int,
    wanted: Validation,
    state: RecurrentCache | None = None,
) -> dict[str, float]:
    """Share of right answers in streams of some length, with its 95 % interval and how many answers it is of; and how
    many of them need a cut fact. All streams go on from `state`, the memory of one row."""
    rate = wanted.facts / segments
    level = Level(segments=segments, facts=(rate, rate), questions=(0, 0), last=LAST)
    calm = {"levels": [level], "hold": 0.0, "min_rows": ROWS, "tokens_per_step": 0, "language_share": 0.0}
    batches = Batches(streams, stage.model_copy(update=calm), _Begin(), "validation")
    total, step = Counts(*[0] * 6), 0
    while total.same + total.cross < wanted.questions:
        batch = batches.batch(f"validation/{segments}/{step}", 0)
        batch = {name: x.to(model.device) for name, x in batch.items() if x.ndim}
        with torch.inference_mode():
            told_to = None if state is None else copies(state, ROWS, model.device)
            outcome = forward(model, model, batch, past_key_values=told_to, use_cache=state is not None)
        counts = outcome.counts.tolist()
        total = Counts(*(a + b for a, b in zip(total, counts, strict=True)))
        step += 1
    right, answers = total.same_right + total.cross_right, total.same + total.cross
    low, high = wilson(right, answers)
    return {
        "accuracy": right / answers,
        "low": low,
        "high": high,
        "answers": answers,
        "cut_right": total.cut_right,
        "cut": total.cut,
    }
