"""What is wrong with a machine or a checkpoint, everything at once, and what can be mended.

`packages` and `machine` look at where vLLM would run, `checkpoint` and `served` at what it would serve.
"""

from vllm_armt.doctor.findings import Finding, mended

__all__ = ["Finding", "mended"]
