"""The Python file that stands beside a checkpoint of the authors' code: parsed for what it defines, never run."""

from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path
from typing import Literal

Code = Literal["il08", "disjoint_memory", "online_armt"]
"""Versions that only their Python file tells from another one."""

MOST_FILES = 16
MOST_BYTES = 1 << 20
"""Of a file; the authors' have some 70 KB."""


def code_beside(directory: Path) -> Code | None:
    """Which version the Python files of a directory are of; None if they don't tell, or contradict one another.

    An `InnerLoopARMTForCausalLM` that puts the memory tokens into the text before the first layer is il08's; in
    disjoint_memory (and an unfinished inner loop that shares this with it) every layer puts them in anew. A module
    that imports `chunk_delta_rule` and defines a wrapper of layers is online_armt's.
    """
    told: set[Code] = set()
    for file in islice(sorted(directory.glob("*.py")), MOST_FILES):
        told |= _told(file)
    return told.pop() if len(told) == 1 else None


def _told(file: Path) -> set[Code]:
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        return set()
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # of no file that could be run
        return set()
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    told: set[Code] = set()
    if "InnerLoopARMTForCausalLM" in classes:
        body = classes["InnerLoopARMTForCausalLM"].body
        augments = any(isinstance(node, ast.FunctionDef) and node.name == "augment_sequence" for node in body)
        told.add("il08" if augments else "disjoint_memory")
    imported = {alias.name for node in module.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    if "chunk_delta_rule" in imported and "AssociativeLayerWrapper" in classes:
        told.add("online_armt")
    return told
