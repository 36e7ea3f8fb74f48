"""What a measurement was made on, for the JSON files."""

from __future__ import annotations

import os
import platform
from typing import Any


def machine() -> dict[str, Any]:
    """Hardware, versions of what computes, and how busy the machine is already."""
    import cpuinfo
    import psutil
    import torch
    import vllm

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
        "vllm": vllm.__version__,
        "vllm_armt": vllm_armt.__version__,
    }
