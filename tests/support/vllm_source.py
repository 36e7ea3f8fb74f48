"""What vLLM's source says, without importing it: a machine without a GPU can't import what is for GPUs."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Found(NamedTuple):
    """Where something is defined.

    Attributes:
        line: of a function or class that of its name, below decorators.
        signature: of a function, without annotations; empty for anything else.
    """

    line: int
    signature: str


def find(file: str, name: str) -> Found | None:
    """Look `name`, such as `Scheduler.schedule` or `Scheduler.running`, up in a file of the installed vLLM.

    What a class has without a definition in its body is what its methods assign to `self`.
    """
    scope: ast.Module | ast.ClassDef | None = _module(file)
    *classes, last = name.split(".")
    for outer in classes:
        scope = next((node for node in _definitions(scope, outer) if isinstance(node, ast.ClassDef)), None)
    if scope is None:
        return None
    for node in _definitions(scope, last):
        return Found(node.lineno, "" if isinstance(node, ast.ClassDef) else f"({_plain(node.args)})")
    for statement in _statements(scope.body):
        if last in _assigned(statement):
            return Found(statement.lineno, "")
    if isinstance(scope, ast.ClassDef):
        for inner in ast.walk(scope):
            if isinstance(inner, ast.stmt) and f"self.{last}" in _assigned(inner):
                return Found(inner.lineno, "")
    return None


def fits(signature: str, recorded: str) -> bool:
    """Whether a signature is the recorded one, where `...` stands for any parameters that need not be given."""
    rest, skips = _parameters(signature), False
    if bool(signature) != bool(recorded):
        return False
    for wanted in _parameters(recorded):
        if wanted == "...":
            skips = True
            continue
        while skips and rest and rest[0] != wanted and "=" in rest[0]:
            rest.pop(0)
        if not rest or rest.pop(0) != wanted:
            return False
        skips = False
    return all("=" in parameter for parameter in rest) if skips else not rest


def _parameters(signature: str) -> list[str]:
    return list(filter(None, signature.removeprefix("(").removesuffix(")").split(", ")))


@cache
def _module(file: str) -> ast.Module | None:
    (folder,) = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr,misc]
    path = Path(folder, file)
    return ast.parse(path.read_text("utf-8")) if path.exists() else None


def _definitions(scope: ast.Module | ast.ClassDef | None, name: str) -> Iterator[Definition]:
    for node in _statements(scope.body if scope else ()):
        if isinstance(node, Definition) and node.name == name:
            yield node


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, also under conditions, which may depend on the platform."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        if isinstance(node, ast.Try):
            yield from _statements(statement for handler in node.handlers for statement in handler.body)


def _assigned(node: ast.stmt) -> list[str]:
    """What a statement assigns to, as it is written."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    parts = (part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target]))
    return [ast.unparse(part) for part in parts]


def _plain(arguments: ast.arguments) -> str:
    """The parameters as they are written, without annotations."""
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(arguments)
