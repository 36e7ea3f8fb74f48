"""The options of `vllm-armt bench`, each declared once, and what is made of their texts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_armt.cli.bench.shapes import SHAPES, Model, named, of_checkpoint
from vllm_armt.cli.values import whole_numbers

Shape = Annotated[str, typer.Option(help=f"Base model, with random weights: {', '.join(SHAPES)}.")]
Shapes = Annotated[
    str, typer.Option("--shape", help=f"Base models, with random weights, separated by commas: {', '.join(SHAPES)}.")
]
ModelDirectory = Annotated[
    Path | None, typer.Option("--model", help="Directory of an ARMT checkpoint, measured instead of --shape.")
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32; several separated by commas.")]
SegmentSize = Annotated[
    str | None, typer.Option(help="S, several separated by commas. [default: see above]", show_default=False)
]
NumMemTokens = Annotated[
    str | None, typer.Option(help="m, one for all S or one for each. [default: S / 8]", show_default=False)
]
DMem = Annotated[
    str | None, typer.Option(help="Width of the memory's keys, one for all S or one for each. [default: 64]")
]
Tokens = Annotated[str, typer.Option(help="Lengths of a document, several separated by commas: 512,10k,1M.")]
Documents = Annotated[str, typer.Option(help="Documents at a time, several separated by commas.")]
Requests = Annotated[str, typer.Option(help="Requests at a time, several separated by commas.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens that a request decodes while it is timed.")]
Repeat = Annotated[int, typer.Option(min=1, help="Repetitions; medians are reported.")]
MaxSeconds = Annotated[
    float, typer.Option(help="Start no further repetition of a case that has taken so many seconds.")
]
StepTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens", help="Tokens of one engine step, of every engine. [default: each engine's own]"
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write machine, versions and every repetition to this file.")
]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw the medians into this PNG.")]
MinRatio = Annotated[
    float | None, typer.Option(help="End with exit code 1 where the median of the ratio is less.", show_default=False)
]


@dataclass(frozen=True)
class Output:
    """Where a report goes beside the screen, and the ratio that each of its cases must reach.

    Raises:
        ValueError: a file could not be written; said before anything is measured.
    """

    json_file: Path | None = None
    plot_file: Path | None = None
    min_ratio: float | None = None

    def __post_init__(self) -> None:
        for option, file in (("--json", self.json_file), ("--plot", self.plot_file)):
            if file and not file.parent.is_dir():
                raise ValueError(f"{option} is {file}, but {file.parent} is not a directory. Make it first.")
        if self.plot_file:
            try:
                import matplotlib  # noqa: F401
            except ImportError as error:
                raise ValueError("--plot needs matplotlib: pip install 'vllm-armt[bench]'.") from error


def models(
    shape: str,
    directory: Path | None,
    dtype: str,
    segment_size: str | None,
    num_mem_tokens: str | None,
    d_mem: str | None,
    default_segment_size: str,
    *,
    any_system: bool = False,
) -> list[Model]:
    """Every model that the options name, one for each dtype and segment size; a checkpoint may be of `any_system`.

    Raises:
        ValueError: an option has a value that is not allowed, or contradicts another one.
    """
    dtypes = [word.strip() for word in dtype.split(",")]
    if directory:
        for option, text in (
            ("--segment-size", segment_size),
            ("--num-mem-tokens", num_mem_tokens),
            ("--d-mem", d_mem),
        ):
            if text is not None:
                raise ValueError(f"{option} is {text}, but the checkpoint of --model has its own. Leave one out.")
        return [of_checkpoint(directory, name, any_system=any_system) for name in dtypes]
    sizes = whole_numbers("--segment-size", segment_size or default_segment_size)
    ms = _for_each("--num-mem-tokens", num_mem_tokens, sizes, [max(1, S // 8) for S in sizes])
    ps = _for_each("--d-mem", d_mem, sizes, [64] * len(sizes))
    return [named(shape, name, *memory) for name, memory in product(dtypes, zip(sizes, ms, ps, strict=True))]


def models_of_shapes(shapes: str, directory: Path | None, *rest: Any, any_system: bool = False) -> list[Model]:
    """The same for several shapes, separated by commas; of a checkpoint those that it is.

    Raises:
        ValueError: as `models`.
    """
    names = [name.strip() for name in shapes.split(",")][: 1 if directory else None]
    return [model for name in names for model in models(name, directory, *rest, any_system=any_system)]


def _for_each(option: str, text: str | None, sizes: list[int], default: list[int]) -> list[int]:
    if text is None:
        return default
    values = whole_numbers(option, text)
    if len(values) not in (1, len(sizes)):
        raise ValueError(
            f"{option} has {len(values)} values and there are {len(sizes)} segment sizes; give one, or one for each."
        )
    return values * len(sizes) if len(values) == 1 else values
