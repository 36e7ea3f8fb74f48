"""What vllm-armt borrows from vLLM stands in the installed version as it was read, and all of it is listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version

from tests.support.vllm_source import Found, find, fits
from vllm_armt.integration.borrowed import ALSO, BORROWED, OPERATORS, PUBLIC, READ_IN

PACKAGE = Path(__file__).parents[2] / "vllm_armt"
INSTALLED = Version(vllm.__version__)

EXTENDING = ("builder", "cache/manager", "cache/spec", "hooks", "model_state", "prometheus", "scheduler", "worker")
"""Modules of `integration` that extend classes which vLLM does not mean to be extended."""


def split(recorded: str) -> tuple[str, str]:
    """The name and the signature of what is listed."""
    name, parenthesis, parameters = recorded.partition("(")
    return name, parenthesis + parameters


def names() -> set[str]:
    return {split(recorded)[0] for file in (BORROWED, ALSO) for listed in file.values() for recorded in _texts(listed)}


def _texts(listed: dict[int, str] | tuple[str, ...]) -> list[str]:
    return list(listed.values() if isinstance(listed, dict) else listed)


def differs(file: str, recorded: str) -> str:
    """How something stands in the installed vLLM, if not as one of the ways that are listed."""
    name, signature = split(recorded)
    others = [split(other) for other in ALSO.get(file, ())]
    accepted = [signature, *(other for known, other in others if known == name)]
    found = find(file, name)
    if found is None:
        return f"vllm/{file} has no {name}"
    if any(fits(found.signature, one) for one in accepted):
        return ""
    return f"vllm/{file}:{found.line}: {name}{found.signature}, not {' or '.join(accepted)}"


@pytest.mark.parametrize("file", BORROWED)
def test_what_is_borrowed_stands_as_it_was_read(file: str):
    assert [difference for recorded in BORROWED[file].values() if (difference := differs(file, recorded))] == []


@pytest.mark.parametrize("file", ALSO)
def test_what_other_versions_have_stands_as_it_was_read_or_not_at_all(file: str):
    listed = {split(recorded)[0] for recorded in BORROWED[file].values()}
    alone = [recorded for recorded in ALSO[file] if split(recorded)[0] not in listed]
    present = [recorded for recorded in alone if find(file, split(recorded)[0])]
    assert [difference for recorded in present if (difference := differs(file, recorded))] == []


@pytest.mark.skipif(Version(INSTALLED.public) != Version(READ_IN), reason=f"lines are those of vLLM {READ_IN}")
def test_lines_are_where_it_was_read():
    lines = {
        f"vllm/{file}:{line} is not {split(recorded)[0]}"
        for file, listed in BORROWED.items()
        for line, recorded in listed.items()
        if (find(file, split(recorded)[0]) or Found(0, "")).line != line
    }
    assert lines == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators of vLLM's CPU build")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiled_operator_takes_what_it_is_given(name: str):
    import vllm._custom_ops  # noqa: F401  (makes them known)

    schema = str(getattr(torch.ops._C, name).default._schema)
    assert schema.replace("($0! -> )", "!").replace("($1! -> )", "!") == f"_C::{name}{OPERATORS[name]}"


@pytest.mark.parametrize(
    ("signature", "recorded", "expected"),
    [
        ("(self, a, b=1)", "(self, a, b=1)", True),
        ("(self, a, b=1, c=None)", "(self, a, b=1)", False),
        ("(self, a)", "(self, a, b=1)", False),
        ("(self, b)", "(self, a)", False),
        ("(self, a, b=1, c=None)", "(self, a, ...)", True),
        ("(self, a)", "(self, a, ...)", True),
        ("(self, a, b)", "(self, a, ...)", False),
        ("(a, b=1, c=2, d=3, e=4)", "(a, ..., c=2, ..., e=4, ...)", True),
        ("(a, c=2, e=4)", "(a, ..., c=2, ..., e=4, ...)", True),
        ("(a, b=1, d=3, e=4)", "(a, ..., c=2, ..., e=4, ...)", False),
        ("(b=1, c=2)", "(..., c=2, ...)", True),
        ("()", "", False),
        ("", "", True),
    ],
)
def test_signatures_are_compared_up_to_what_need_not_be_given(signature: str, recorded: str, expected: bool):
    assert fits(signature, recorded) == expected


def modules() -> list[Path]:
    return sorted(file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))


def tree(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).with_suffix(".py").read_text("utf-8"))


def imports(module: Path) -> Iterator[str]:
    """What a module of ours imports from vLLM: names, or files as `_custom_ops.py`."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.startswith("vllm.")]
            yield from (name.removeprefix("vllm.").replace(".", "/") + ".py" for name in dotted)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            folder = str(node.module).removeprefix("vllm").removeprefix(".").replace(".", "/")
            for alias in node.names:
                file = f"{folder}/{alias.name}.py"
                yield file if file in BORROWED else alias.name


@pytest.mark.parametrize("module", modules(), ids=str)
def test_what_is_imported_from_vllm_is_listed(module: Path):
    listed = {name.split(".")[0] for name in names()} | set(BORROWED) | PUBLIC
    assert set(imports(module)) - listed == set()


@pytest.mark.parametrize("module", EXTENDING)
def test_what_is_used_of_a_class_that_is_extended_is_listed(module: str):
    """Members of vLLM's that a class of ours overrides, and those that it uses and has not made itself."""
    listed = {name.rpartition(".")[2] for name in names()}
    loaded = import_module("vllm_armt.integration." + module.replace("/", "."))
    missing = set()
    for node in ast.walk(tree(Path("integration", module))):
        if not isinstance(node, ast.ClassDef):
            continue
        bases = getattr(loaded, node.name).__mro__
        theirs = {name for base in bases if base.__module__.startswith("vllm.") for name in vars(base)}
        others = {name for base in bases if not base.__module__.startswith("vllm.") for name in vars(base)}
        if theirs:
            inherited = used(node, ast.Load) - others - defined(node) - (used(node, ast.Store) - theirs - listed)
            missing |= {f"{node.name}.{name}" for name in (defined(node) & theirs | inherited) - listed}
    assert missing == set()


def defined(definition: ast.ClassDef) -> set[str]:
    """Names that stand in the class's body."""
    functions = {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
    return functions | {
        target.id
        for node in definition.body
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }


def used(definition: ast.ClassDef, context: type[ast.expr_context]) -> set[str]:
    """Names of members that the methods read, or assign, of `self`, of their class, or of what they override."""
    owners = {"self", "cls", "super()"}
    members = (node for node in ast.walk(definition) if isinstance(node, ast.Attribute))
    return {node.attr for node in members if isinstance(node.ctx, context) and ast.unparse(node.value) in owners}
