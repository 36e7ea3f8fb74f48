"""Files of a stranger's directory: regular ones, inside of it, of a bounded size where they are read whole."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from vllm_armt.config.refused import Refused, shown, translated

MOST_JSON = 64 << 20
"""Bytes of a JSON file; the index of the largest published models has 10 MB."""


def regular_file(path: Path) -> Path:
    """The same path.

    Raises:
        FileNotFoundError: there is nothing.
        Refused: it is something else than a file, for instance a pipe, on which reading would wait for ever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is no regular file. Give a file, not a directory, pipe or device.")
    return path


def inside(directory: Path, path: Path) -> Path:
    """The same path, of a regular file in the directory, wherever links lead.

    A snapshot of the Hugging Face cache consists of links into the folder of its repository, which are followed.

    Raises:
        OSError: there is nothing.
        Refused: it leads out of the directory, or to something else than a file.
    """
    with translated(f"{path} can't be followed"):
        home, found = directory.resolve(), path.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not found.is_relative_to(home):
        raise Refused(f"{path} is a link out of its directory, to {found}. Copy that file here if it belongs here.")
    return regular_file(path)


def shard_of(index: Path, name: Any) -> Path:
    """The file of a shard that an index names.

    Raises:
        OSError: there is none.
        Refused: it is not beside the index.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"{index} names the shard {shown(name)}; a shard is a file beside its index.")
    return inside(index.parent, index.parent / name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: there is no such file.
        Refused: it is no object, no JSON, or too large to be one that belongs to a checkpoint.
    """
    size = regular_file(path).stat().st_size
    if size > MOST_JSON:
        raise Refused(f"{path} has {size} bytes, too many for a JSON file of a checkpoint (at most {MOST_JSON}).")
    with translated(f"{path} is not JSON"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise Refused(f"{path} holds {shown(found)}; it must be a JSON object.")
    return found
