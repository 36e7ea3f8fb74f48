"""`vllm-armt babilong`: what a model answers about facts hidden in long texts."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_armt.cli.values import json_object

_UNITS = {"": 1, "k": 1_000, "M": 1_000_000}


def babilong(
    model: Annotated[str, typer.Option(help="Directory of a checkpoint, or URL of an OpenAI-compatible server.")],
    output: Annotated[
        Path, typer.Option(help="Directory of the results; if it holds some of the same run, that goes on.")
    ],
    tasks: Annotated[
        str, typer.Option(help="qa1 to qa5, remember, rewrite; several separated by commas.")
    ] = "qa1,qa2,qa3,qa4,qa5",
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt, with k for thousands and M for millions; 0k is without background.")
    ] = "0k,1k,4k,16k",
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 100,
    facts: Annotated[
        str | None, typer.Option(help="Facts of a story, several separated by commas. [default: as the task has]")
    ] = None,
    background: Annotated[
        Path, typer.Option(help="Directory of .txt files to hide facts in; python -m examples.background fetches some.")
    ] = Path("models/background/test"),
    split: Annotated[Literal["test", "validation", "train"], typer.Option(help="Whose stories.")] = "test",
    seed: Annotated[int, typer.Option(help="Of stories, text and places.")] = 0,
    segment_size: Annotated[
        int | None,
        typer.Option(min=1, help="S, to cut facts by and to know which are cut. [default: the checkpoint's]"),
    ] = None,
    cut: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of samples with a segment boundary through the first needed fact."),
    ] = 0.0,
    mentions: Annotated[
        float, typer.Option(min=0, max=10, help="Sentences with names in them that tell no fact, per 1,000 tokens.")
    ] = 0.0,
    mention_kinds: Annotated[
        str,
        typer.Option(
            help="Of these: text (the background's own), possession, thought, negation, wish, report, somebody else, "
            "thing; several separated by commas."
        ),
    ] = "all",
    whitespace: Annotated[
        Literal["as-is", "collapsed"], typer.Option(help="Of the text; collapsed makes single spaces of all.")
    ] = "as-is",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of bAbI's files (qa1_*_test.txt), whose stories are hidden in place of our own, or of "
            "BABILong's rows (input, question, target), which are asked as they are: parquet, JSON or saved data sets.",
            show_default=False,
        ),
    ] = None,
    hard: Annotated[
        bool,
        typer.Option("--hard", help="Ask every kind of hard text: other forms, sentences that only look like facts."),
    ] = False,
    prompt: Annotated[
        Literal["plain", "babilong", "chat"],
        typer.Option(help="babilong explains the task as BABILong does; chat says so in the model's chat template."),
    ] = "plain",
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts in place of ours, vllm_armt/babilong/prompts.json.", show_default=False),
    ] = None,
    length_tokenizer: Annotated[
        str | None, typer.Option(help="In whose tokens lengths are counted. [default: the model's]", show_default=False)
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of the server's model. [default: as the server says]")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="On the server. [default: its first]")] = None,
    together: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time. [default: 32; fewer beyond 2M tokens of them]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="Of the engine. [default: auto]")] = None,
    engine: Annotated[str | None, typer.Option(help="Further arguments of vllm.LLM, as JSON.")] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="End with exit code 1 where the accuracy is less.", show_default=False)
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw heat maps into PNG files beside the results.")] = False,
) -> None:
    """Hide facts in long texts, ask for them, and say how many answers are right.

    Stories are those of bAbI's tasks and of the ARMT paper's; texts are as long as asked for to the token; answers
    are scored as BABILong scores them. The output directory gets every sample (samples.jsonl), a summary
    (results.json), BABILong's own CSV files (leaderboard.csv and a folder) and with --plot the heat maps of task and of
    depth by length.
    """
    every_length = _numbers("--lengths", lengths, _UNITS)
    every_count = [None] if facts is None else _numbers("--facts", facts, {"": 1})
    options = json_object("--engine", engine or "{}")
    if plot and hard:
        raise ValueError(
            "--plot draws lengths and depths, not kinds of hard texts. Leave out one of --plot and --hard."
        )
    if plot:
        _need_matplotlib()

    from transformers import AutoTokenizer

    import vllm_armt.hf  # noqa: F401  (the checkpoint's type is then known)
    from vllm_armt.babilong import Cell, task_named
    from vllm_armt.babilong.hard import kinds_of
    from vllm_armt.cli.babilong.answers import Answers, Engine, Server
    from vllm_armt.cli.babilong.results import Results
    from vllm_armt.cli.babilong.sources import Wanted, source_of

    cells = []
    for task in (task_named(name.strip()) for name in tasks.split(",")):
        every_kind = kinds_of(task) if hard else [None]
        cells += [Cell(*cell) for cell in product([task.name], every_length, every_count, every_kind)]
    server = None
    if model.startswith(("http://", "https://")):
        _need_engine(model, {"--dtype": dtype, "--engine": engine})
        server = Server(model, served_model_name, tokenizer, max_tokens)
        tokenizer = server.tokenizer
    elif not (Path(model) / "config.json").exists():
        raise ValueError(f"{model} is no checkpoint: it has no config.json.")
    elif served_model_name:
        raise ValueError(
            f"--served-model-name is {served_model_name!r}, but {model} is a directory. Leave it out, or give a "
            "server's address as --model."
        )
    segment_size = segment_size or _segment_size(server.directory if server else Path(model))
    words = AutoTokenizer.from_pretrained(tokenizer or model)
    drawn: dict[str, Any] = {
        "split": split,
        "seed": seed,
        "segment_size": segment_size,
        "cut": cut,
        "mentions": mentions,
        "mention_kinds": _mention_kinds(mention_kinds),
    }
    wanted = Wanted(data, background, whitespace, prompt, prompts, length_tokenizer, drawn)
    source, text = source_of(wanted, cells, words)
    dtype = dtype or "auto"
    asked = {"model": model, "max_tokens": max_tokens, "dtype": dtype, "engine": options}
    settings = (
        asked
        | drawn
        | {
            "prompt": prompt,
            "prompts": prompts and str(prompts),
            "whitespace": whitespace,
            "data": data and str(data),
            "lengths_in": length_tokenizer
            or ("who made the rows" if data and text is None and any(every_length) else "the model"),
            "background": text and text.digest,
        }
    )

    def start() -> Answers:
        return server or Engine(model, source.longest(cells, samples), max_tokens, dtype, options)

    results = Results(output, settings)
    with results.written(cells, samples, min_accuracy, plot):
        results.collect(source, start, cells, samples, together)


def _numbers(option: str, text: str, units: dict[str, int]) -> list[int]:
    found = [re.fullmatch(rf"(\d+)({'|'.join(units)})", word.strip()) for word in text.split(",")]
    if not all(found):
        example = "4k,128k,1M" if "k" in units else "10,50"
        raise ValueError(f"{option} is {text!r}; write whole numbers separated by commas: {example}.")
    return [int(match[1]) * units[match[2]] for match in found if match]


def _mention_kinds(text: str) -> list[str]:
    from vllm_armt.babilong import MENTIONS

    if text == "all":
        return list(MENTIONS)
    chosen = [kind.strip() for kind in text.split(",")]
    if unknown := set(chosen) - set(MENTIONS):
        raise ValueError(
            f"--mention-kinds has {', '.join(sorted(unknown))}; allowed: all, or of {', '.join(MENTIONS)}."
        )
    return chosen


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'vllm-armt[bench]'.") from error


def _need_engine(url: str, options: dict[str, str | None]) -> None:
    for option, text in options.items():
        if text is not None:
            raise ValueError(
                f"{option} is {text!r}, but the server at {url} was started with its own. Leave {option} out, or give "
                "a directory as --model."
            )


def _segment_size(directory: Path | None) -> int | None:
    """S of a checkpoint; None if it has no segments, or is not on this machine."""
    if directory is None or not (file := directory / "config.json").exists():
        return None
    return json.loads(file.read_text()).get("segment_size")
