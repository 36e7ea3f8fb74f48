"""What opens the gates of a model's memories: `python -m examples.train.gates MODEL`.

For every layer and memory token the mean of beta, over segments in which nothing is told and over those in which one
person or thing alone is told of. A model that holds what it read has gates near 0 where nothing is told, or writes
there what nobody asks for; one that tells persons apart has an open gate for each.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.background import BACKGROUND
from examples.texts import fetched
from examples.train.recipe import Level, Stage
from examples.train.streams import NONE, Streams
from vllm_armt.babilong import WHITESPACE, Background
from vllm_armt.hf import ARMTForCausalLM

BATCH = 16
SEGMENTS = 4


def gates_of(model: nn.Module) -> list[nn.Module]:
    """The linear maps whose outputs beta is the sigmoid of, one a layer that has an associative memory."""
    return [module for name, module in model.named_modules() if name.endswith("W_mb")]


@contextmanager
def gates(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect what beta is the sigmoid of, `[B, m, h]`, of every segment that a model writes meanwhile, by layer."""
    modules = gates_of(model)
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _, __, output, layer=layer: layer.append(output))
        for module, layer in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="qa1")
    parser.add_argument("--streams", type=int, default=64, help=f"of {SEGMENTS} segments, of the validation part")
    parser.add_argument("--text", type=Path, default=BACKGROUND, help="directory with validation/*.txt")
    parser.add_argument("--whitespace", choices=WHITESPACE, default="collapsed", help="of the text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: ARMTForCausalLM = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = Background.of_directory(fetched(args.text) / "validation", tokenizer, args.whitespace)
    streams = Streams(tokenizer, text, [args.task], "validation")
    _print(betas(model, streams, args.task, args.streams))


def betas(model: ARMTForCausalLM, streams: Streams, task: str, count: int) -> dict[str | None, Tensor]:
    """Mean beta `[layers, m]` by the only topic that is told of in a segment, None where nothing is.

    Layers without an associative memory are left out, and so are segments with a part of a fact; memory heads are
    averaged.

    Raises:
        ValueError: no layer has one.
    """
    if not gates_of(model):
        raise ValueError("No layer of this model has an associative memory, so it has no gates: name an ARMT.")
    S = model.config.segment_size
    stage = Stage(name="gates", segment_size=S, levels=[], max_steps=0, tasks={task: 1.0})
    level = Level(segments=SEGMENTS, facts=(0.5, 1), questions=(0, 0), last=1)
    random = Random(0)
    names = {number: name for name, number in streams.classes["topics"].items()}
    found: dict[str | None, list[Tensor]] = defaultdict(list)
    for _ in range(0, count, BATCH):
        drawn = [streams.draw(random, stage, level, False) for _ in range(BATCH)]
        with gates(model) as seen, torch.inference_mode():
            model(torch.from_numpy(np.stack([row.ids for row in drawn]).astype(np.int64)), logits_to_keep=1)
        for begin in range(0, (SEGMENTS - 1) * S, S):
            beta = torch.stack([layer[begin // S].sigmoid().mean(-1) for layer in seen], dim=1)
            for row, stream in zip(beta, drawn, strict=True):
                topics = stream.topics[begin : begin + S]
                told = set(topics[topics != NONE].tolist())
                if len(told) < 2 and not any(_runs_through(stream.told, boundary) for boundary in (begin, begin + S)):
                    found[names[told.pop()] if told else None].append(row)
    return {topic: torch.stack(rows).mean(0) for topic, rows in found.items()}


def _runs_through(told: np.ndarray, boundary: int) -> bool:
    """Whether something is told on both sides of a boundary."""
    return boundary > 0 and bool(told[boundary - 1] and told[boundary])


def _print(found: dict[str | None, Tensor]) -> None:
    layers, m = next(iter(found.values())).shape
    table = Table("layer", "told of", *(f"m {j}" for j in range(m)))
    for layer in range(layers):
        for topic in sorted(found, key=lambda topic: topic or ""):
            table.add_row(str(layer), topic or "nothing", *(f"{beta:.2f}" for beta in found[topic][layer].tolist()))
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
