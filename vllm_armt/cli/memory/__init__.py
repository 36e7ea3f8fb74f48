"""`vllm-armt memory`: memories that last, made and looked after on this machine, with no server.

`build`, `append` and `ask` start an engine in this process; the others only read and write files.
"""

from __future__ import annotations

import typer

from vllm_armt.cli.memory.ask import ask
from vllm_armt.cli.memory.files import export, import_
from vllm_armt.cli.memory.look import list_, show
from vllm_armt.cli.memory.read import append, build
from vllm_armt.cli.memory.sizes import sizes
from vllm_armt.cli.memory.upkeep import gc, rm, verify

app = typer.Typer(
    help="Keep what a model has read: build memories of texts, ask them, and look after them.", no_args_is_help=True
)
app.command()(build)
app.command()(append)
app.command()(ask)
app.command("list")(list_)
app.command()(show)
app.command()(rm)
app.command()(export)
app.command("import")(import_)
app.command()(gc)
app.command()(verify)
app.command()(sizes)
