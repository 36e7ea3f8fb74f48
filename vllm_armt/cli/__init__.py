"""The command line `vllm-armt`: one file a command, and errors as one line for the person who typed it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_armt import __version__
from vllm_armt.cli import bench, memory
from vllm_armt.cli.babilong import babilong
from vllm_armt.cli.convert import convert
from vllm_armt.cli.doctor import doctor
from vllm_armt.cli.init import init
from vllm_armt.cli.serve import PASS_ON, serve
from vllm_armt.memories.errors import MemoriesError

app = typer.Typer(
    name="vllm-armt",
    help="Recurrent-memory transformers for vLLM: convert, create, serve and measure checkpoints, and keep memories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor)
app.command()(convert)
app.command()(init)
app.command(context_settings=PASS_ON, add_help_option=False)(serve)
app.add_typer(memory.app, name="memory")
app.command()(babilong)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-armt {__version__}")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; exits with 1 on an error in what was given, which is one line, 2 on a wrong usage."""
    try:
        app()
    except (ValueError, OSError, MemoriesError) as error:
        # those of libraries may have several
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
