"""What the commands of `vllm-armt memory` share: arguments and options, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MAX_BYTES = "--memories-max-bytes"

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint of the model whose memories they are.")]
Reference = Annotated[str, typer.Argument(metavar="MEMORY", help="Name or id of a memory.")]
Folder = Annotated[
    Path, typer.Option("--memories", metavar="FOLDER", help="The folder of memories; servers may share it.")
]
Salt = Annotated[
    str | None,
    typer.Option(
        "--cache-salt", envvar="VLLM_ARMT_CACHE_SALT", help="Whose memories: those made with this salt alone."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Memories of a model served in this dtype only, where there are several.", show_default=False),
]
ServedDtype = Annotated[str, typer.Option("--dtype", help="In what the model computes, as vLLM's.")]
Engine = Annotated[str, typer.Option(metavar="JSON", help="Further arguments of vllm.LLM.")]
MaxBytes = Annotated[
    str | None,
    typer.Option(
        MAX_BYTES,
        metavar="N",
        help="What this model's files may take in the folder: 512M, 50G. [default: no bound]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
