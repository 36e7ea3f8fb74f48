"""`vllm-armt doctor`: what is wrong with this machine or a checkpoint, and mending it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vllm_armt.doctor import Finding

MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG", "mended": "FIXED"}


def doctor(
    directory: Annotated[Path | None, typer.Argument(help="A checkpoint to look at, too.")] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be: vLLM's name, wheels beside torch that do not import.")
    ] = False,
    memories: Annotated[
        str | None, typer.Option(help="A folder of memories as `serve` takes it, to see whether it can be written.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Look at vLLM, the packages beside it, the device and the folders; and at a checkpoint: as what it is served.

    Everything that is wrong is said at once. Exits with 1 if anything is.
    """
    from vllm_armt.doctor import mended

    # vLLM's own log would stand between the lines
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    found = []
    for finding in mended(_findings(directory, memories)) if fix else _findings(directory, memories):
        found.append(finding)
        if not as_json:
            print(f"{MARKS[finding.state]} {finding.about}: {finding.said}", flush=True)
    wrong = [finding for finding in found if finding.state == "wrong"]
    if as_json:
        said = [{name: value for name, value in asdict(finding).items() if name != "mend"} for finding in found]
        print(json.dumps({"ok": not wrong, "findings": said}, indent=2))
    elif wrong:
        print(f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong.", file=sys.stderr)
    raise typer.Exit(bool(wrong))


def _findings(directory: Path | None, memories: str | None) -> Iterator[Finding]:
    from vllm_armt.doctor.findings import Finding, looked
    from vllm_armt.doctor.machine import devices, folders
    from vllm_armt.doctor.packages import packages
    from vllm_armt.options import Options

    yield from looked("packages", packages)
    yield from looked("vLLM imports", devices)
    yield from looked("folders", lambda: folders(Options(memories=memories).memories_directory))
    if directory is None:
        return
    if not directory.is_dir():
        yield Finding("checkpoint", "wrong", f"{directory} is no directory. Give that of a checkpoint.")
        return

    def of_checkpoint() -> Iterator[Finding]:
        from vllm_armt.doctor.checkpoint import checkpoint

        found, config = checkpoint(directory)
        yield from found
        if config is not None:
            from vllm_armt.doctor.served import served

            yield from looked("served as", lambda: served(directory))

    yield from looked("checkpoint", of_checkpoint)
