"""What a memory finds when it has grown old: `python -m examples.train.ages MODEL`.

A memory reads text of the validation part in which nothing is told. At each age streams of 4 and of 16 segments are
told to it and asked about, as at its beginning. A model whose answers get fewer writes where nothing is told, until
that covers what is; |M| by layer shows where. To ask behind ten million tokens takes ten million tokens a sample; here
one reading does for hundreds of questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.background import BACKGROUND
from examples.texts import fetched
from examples.train.carried import cut_off
from examples.train.recipe import Stage, Validation
from examples.train.streams import Streams
from examples.train.validation import accuracy
from vllm_armt.babilong import WHITESPACE, Background
from vllm_armt.hf import RecurrentCache, RecurrentForCausalLM

READ_AT_ONCE = 64
"""Segments of one call."""

SEGMENTS = (4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="qa1")
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 1_000_000, 4_000_000], help="that it has read")
    parser.add_argument("--questions", type=int, default=200, help="of each age and length of streams")
    parser.add_argument("--mentions", type=float, default=1.0, help="per 1,000 tokens, of what is read and of streams")
    parser.add_argument("--text", type=Path, default=BACKGROUND, help="directory with validation/*.txt")
    parser.add_argument("--whitespace", choices=WHITESPACE, default="collapsed", help="of the text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: RecurrentForCausalLM = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = Background.of_directory(fetched(args.text) / "validation", tokenizer, args.whitespace)
    streams = Streams(tokenizer, text, [args.task], "validation")
    stage = stage_of(model, args.task, args.mentions)
    wanted = Validation(segments=list(SEGMENTS), questions=args.questions)
    table = Table("tokens", *(f"{kind}, {n} segments" for n in SEGMENTS for kind in ("whole", "cut")), "|M| by layer")
    try:
        for tokens, state in aged(model, streams, stage, sorted(args.tokens)):
            table.add_row(f"{tokens:,}", *row(model, streams, stage, wanted, state))
    finally:  # a reading takes long: what was asked before it was broken off is printed
        Console().print(table)


def row(
    model: RecurrentForCausalLM, streams: Streams, stage: Stage, wanted: Validation, state: RecurrentCache | None
) -> Iterator[str]:
    """What a memory of one age finds of whole and of cut facts, by the segments of streams, and its sizes by layer."""
    for segments in SEGMENTS:
        found = accuracy(model, streams, stage, segments, wanted, state)
        right = round(found["accuracy"] * found["answers"])
        yield f"{right - found['cut_right']:.0f}/{found['answers'] - found['cut']:.0f}"
        yield f"{found['cut_right']:.0f}/{found['cut']:.0f}"
    yield "" if state is None else " ".join(f"{float(M.norm()):.0f}" for _, M in sorted(state.M.items()))


def stage_of(model: RecurrentForCausalLM, task: str, mentions: float) -> Stage:
    """What is read and told: half of the streams with a cut fact, a third of the mentions broken as one is."""
    return Stage(
        name="ages",
        segment_size=model.config.segment_size,
        levels=[],
        max_steps=0,
        tasks={task: 1.0},
        cut=0.5,
        mentions=mentions,
        broken=0.3,
    )


def aged(
    model: RecurrentForCausalLM, streams: Streams, stage: Stage, ages: list[int]
) -> Iterator[tuple[int, RecurrentCache | None]]:
    """The memory of one row at some ages, ascending: the tokens that it has read, a whole number of calls, and it."""
    read, state, T = 0, None, READ_AT_ONCE * stage.segment_size
    with tqdm(total=ages[-1], unit="token", unit_scale=True) as progress:
        for age in ages:
            while read < age:
                ids = torch.from_numpy(streams.text(Random(f"ages/{read}"), stage, T)).long().to(model.device)
                with torch.inference_mode():
                    output = model(ids[None], past_key_values=state, use_cache=True, logits_to_keep=1)
                    state = cut_off(model, output.past_key_values)
                read += T
                progress.update(T)
            yield read, state


if __name__ == "__main__":
    main()
