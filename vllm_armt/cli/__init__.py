"""The command line `vllm-armt`: one file a command, and errors as one line for the person who typed it."""

from __future__ import annotations

import sys

import typer

from vllm_armt.cli import bench, memory
from vllm_armt.cli.babilong import babilong
from vllm_armt.cli.convert import convert
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
)
app.command()(convert)
app.command()(init)
app.command(context_settings=PASS_ON, add_help_option=False)(serve)
app.add_typer(memory.app, name="memory")
app.command()(babilong)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; exits with 1 on an error in what was given, 2 on a wrong usage."""
    try:
        app()
    except (ValueError, OSError, MemoriesError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
