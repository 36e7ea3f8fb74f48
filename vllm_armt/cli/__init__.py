"""The command line `vllm-armt`: one file a command, and errors as one line for the person who typed it."""

from __future__ import annotations

import sys

import typer

from vllm_armt.cli import bench
from vllm_armt.cli.babilong import babilong
from vllm_armt.cli.convert import convert
from vllm_armt.cli.init import init

app = typer.Typer(
    name="vllm-armt",
    help="Recurrent-memory transformers for vLLM: convert, create and measure checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(convert)
app.command()(init)
app.command()(babilong)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; exits with 1 on an error in what was given, 2 on a wrong usage."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
