"""`vllm-armt bench`: measurements of the engine on this machine, as ratios within one run.

Every command runs its sides in one process and in turns. `vllm bench` measures one engine or server per call,
so it has no part in them; `vllm bench serve` measures a server of ours as it does any other.
"""

from __future__ import annotations

import typer

from vllm_armt.cli.bench.attention import attention
from vllm_armt.cli.bench.decode import decode
from vllm_armt.cli.bench.documents import documents
from vllm_armt.cli.bench.engines import environment
from vllm_armt.cli.bench.memory import memory
from vllm_armt.cli.bench.profile import profile
from vllm_armt.cli.bench.queue import queue
from vllm_armt.cli.bench.schedule import schedule

app = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True)


@app.callback()
def bench(context: typer.Context) -> None:
    """Measure the engine on this machine."""
    context.with_resource(environment())


for command in (schedule, attention, documents, decode, memory, queue, profile):
    app.command()(command)
